// The kernels of the instruction sets, as one table of entry points for all targets (instruction_sets.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "batch_norm_params.h"
#include "isa.h"
#include "params.h"

namespace resnet_fused::cpu {

// Direct sums over activations of one dtype, and blocks that contain them. The gradients may be null.
struct DirectKernels {
  void (*pointwise)(const ConvParams&);
  void (*direct)(const ConvParams&);
  void (*bottleneck)(const BlockParams&);
  void (*basic_block)(const BlockParams&);
  void (*weight_gradient)(const WeightGradientParams&);
  void (*input_gradient)(const InputGradientParams&);
  int64_t (*multiply_add_loop)(int64_t rounds, float* sink);
};

// What serves activations of every dtype, computing in float32.
struct Kernels {
  int64_t lanes;  // float32 lanes of a vector; a panel of packed weights is two vectors wide
  void (*pack)(const PackParams&);
  // U of a 3 x 3 layer's packed weights, which are of a dtype, and its number of elements (in_channels, out_channels, stride).
  void (*transform)(const LayerParams& layer, int64_t stride, DType weight, float* u);
  int64_t (*transformed_size)(int64_t in_channels, int64_t out_channels, int64_t stride);
  void (*winograd)(const ConvParams&, const WinogradPlan&);
  void (*weight_gradient_winograd)(const WeightGradientParams&);
  void (*stem)(const StemParams&);
  void (*average_pool)(const AveragePoolParams&);
  void (*pass)(const PassParams&);
  // Weights of a grouped convolution to float32, its filters having `kernel` columns, and their number.
  void (*pack_grouped)(const PackParams&, int64_t groups, int64_t kernel);
  int64_t (*grouped_size)(int64_t groups, int64_t in_channels, int64_t out_channels, int64_t taps);
  void (*grouped)(const ConvParams&);
  DirectKernels float32;
  BatchNormKernels batch_norm;
};

// One instruction set: its kernels, the direct sums of bfloat16 and of float16 in float32 arithmetic, and those by instructions
// for bfloat16 that a CPU may have.
struct InstructionSet {
  Isa isa;
  const Kernels& kernels;
  const DirectKernels& widened_bf16;
  const DirectKernels& widened_f16;
  const DirectKernels* bfloat16;
};

// The instruction set that is used.
const InstructionSet& instruction_set();

// Its kernels.
inline const Kernels& kernels() { return instruction_set().kernels; }

// The dtype of packed weights that direct sums over so many channels of a dtype take: bfloat16 where pairs of channels are
// multiplied by instructions for them.
inline DType direct_weights(DType dtype, int64_t channels) {
  return dtype == DType::bfloat16 && has_avx512_bf16() && channels % 2 == 0 ? dtype : DType::float32;
}

// The direct sums for activations of a dtype with weights of one.
const DirectKernels& direct_kernels(DType dtype, DType weights);
inline const DirectKernels& direct_kernels(DType dtype, int64_t channels) {
  return direct_kernels(dtype, direct_weights(dtype, channels));
}

// The instruction sets that this library was built for, as numbers of Isa, the best one last.
std::vector<int64_t> built_instruction_sets();

}  // namespace resnet_fused::cpu
