// The kernels of one instruction set as a table of entry points; bindings.cpp picks the table at run time.
#pragma once

#include "isa.h"
#include "params.h"

namespace resnet_fused::cpu {

struct Kernels {
  int64_t lanes;  // float32 lanes of a vector; a panel of packed weights is two vectors wide
  void (*pack)(const PackParams&);
  // U of a 3 x 3 layer's packed weights, and its number of elements (in_channels, out_channels, stride).
  void (*transform)(const LayerParams& layer, int64_t stride, bool bfloat16, float* u);
  int64_t (*transformed_size)(int64_t in_channels, int64_t out_channels, int64_t stride);
  void (*winograd)(const ConvParams&, const WinogradPlan&);
  void (*pointwise)(const ConvParams&);
  void (*direct)(const ConvParams&);
  void (*stem)(const StemParams&);
  void (*average_pool)(const AveragePoolParams&);
  void (*bottleneck)(const BlockParams&);
  void (*basic_block)(const BlockParams&);
  void (*weight_gradient)(const WeightGradientParams&);
  void (*input_gradient)(const InputGradientParams&);
  int64_t (*multiply_add_loop)(int64_t rounds, float* sink);
};

const Kernels& avx512_kernels();
const Kernels& avx2_kernels();

// Direct convolutions of bfloat16 activations with an even number of channels by vdpbf16ps, and blocks that contain them.
struct Bf16Kernels {
  void (*pointwise)(const ConvParams&);
  void (*direct)(const ConvParams&);
  void (*bottleneck)(const BlockParams&);
  void (*basic_block)(const BlockParams&);
  void (*weight_gradient)(const WeightGradientParams&);
  void (*input_gradient)(const InputGradientParams&);
  int64_t (*multiply_add_loop)(int64_t rounds, float* sink);
};

const Bf16Kernels& avx512_bf16_kernels();

}  // namespace resnet_fused::cpu
