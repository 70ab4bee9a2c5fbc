// The launch of a whole residual block, planned by pure arithmetic, as conv2d_plan.h plans a convolution's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "block_params.h"
#include "plan.h"

namespace resnet_fused {

// y[batch, height, width, out_channels] = relu(main(x[batch, height, width, channels]) + shortcut(x)), channels_last. The main
// path of a bottleneck has layers of 1x1, 3x3 and 1x1 with `width` channels in between. projected: the shortcut is a 1x1 layer.
struct BlockProblem {
  int64_t batch, height, width, channels, inner_channels, out_channels;
  bool projected;
  ElementType type;
};

struct BlockPointers {
  const void *x, *weight, *bias;
  void* y;
};

struct BlockPlan {
  KernelLaunch launch;
  BlockParams params;  // without the pointers; see with_pointers
};

// Bytes of a block's packed weights, and floats of its biases.
int64_t block_weight_bytes(const BlockProblem& problem);
int64_t block_bias_floats(const BlockProblem& problem);

// The plan without pointers; `kernel` asks for one instantiation by name, or is empty. Throws std::invalid_argument with the
// reason where no kernel serves the problem.
BlockPlan plan_block(const BlockProblem& problem, const DeviceProperties& device, const std::string& kernel);

BlockParams with_pointers(const BlockPlan& plan, const BlockPointers& pointers);

// Names of the instantiations that serve the problem on the device, those with resident weights first.
std::vector<std::string> block_kernels(const BlockProblem& problem, const DeviceProperties& device);

}  // namespace resnet_fused
