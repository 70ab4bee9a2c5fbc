// The launches of batch norm's passes and of add_relu, planned by pure functions; see conv2d_plan.h.
#pragma once

#include <vector>

#include "batch_norm_params.h"
#include "plan.h"

namespace resnet_fused {

enum class BatchNormPass : int64_t { statistics = 0, apply_fwd = 1, reduce_bwd = 2, apply_bwd = 3, apply_activated_fwd = 4 };

// The pass that applies a batch norm and then the function.
constexpr BatchNormPass apply_pass(Activation function) {
  return function > Activation::relu ? BatchNormPass::apply_activated_fwd : BatchNormPass::apply_fwd;
}

struct BatchNormPlan {
  std::vector<KernelLaunch> launches;  // in order; all take `params`
  int64_t workspace_bytes;             // of BatchNormParams::partial
  BatchNormParams params;              // sizes only; the caller fills in the rest
};

// rows: pixels of the channels_last activations. Needs rows and channels > 0.
BatchNormPlan plan_batch_norm(BatchNormPass pass, int64_t rows, int64_t channels, ElementType type,
                              const DeviceProperties& device);

KernelLaunch plan_add_relu(bool backward, int64_t count, ElementType type, const DeviceProperties& device);

}  // namespace resnet_fused
