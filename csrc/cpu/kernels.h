// The kernels of the instruction sets, as one table of entry points for all targets (instruction_sets.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "batch_norm_params.h"
#include "isa.h"
#include "params.h"

namespace resnet_fused::cpu {

// Direct sums over activations of one dtype, and blocks that contain them.
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

// One instruction set: its kernels, and the direct sums of bfloat16 where a CPU may have instructions for them.
struct InstructionSet {
  Isa isa;
  const Kernels& kernels;
  const DirectKernels* bfloat16;
};

// The instruction set that is used.
const InstructionSet& instruction_set();

// Its kernels.
inline const Kernels& kernels() { return instruction_set().kernels; }

// Its direct sums for activations of a dtype. Throws where this CPU has none.
const DirectKernels& direct_kernels(DType dtype);

// The instruction sets that this library was built for, as numbers of Isa, the best one last.
std::vector<int64_t> built_instruction_sets();

}  // namespace resnet_fused::cpu
