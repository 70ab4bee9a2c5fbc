// The launch of a convolution, planned by pure arithmetic: problem and device in, kernels, grids and parameters out.
// The CUDA operator launches the plan; the tests hand the same plan to an executor on the CPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "conv2d_params.h"
#include "plan.h"

namespace resnet_fused {

// y[batch, P, Q, out_channels] = activation(conv2d(x[batch, height, width, channels]) + bias + residual), channels_last. What
// follows the convolution is told to a launch: plans don't depend on it.
struct Conv2dProblem {
  int64_t batch, height, width, channels, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  ElementType type;

  int64_t out_height() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_width() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int64_t out_pixels() const { return batch * out_height() * out_width(); }
};

// What a launch is told beside its plan; `slope`: of a leaky ReLU, below zero.
struct Conv2dArguments {
  const void *x, *weight, *bias, *residual;
  void *y, *partial;
  Activation activation;
  float slope;
};

// Shape of the packed weight: [out_channels, filter_rows, runs, padded_run_length], a run's run_length elements after
// `lead` zeros, and then zeros. See Conv2dParams.
struct WeightLayout {
  int64_t filter_rows, runs, lead, run_length, padded_run_length;
};

struct Conv2dPlan {
  std::vector<KernelLaunch> launches;  // in order; all take `params`
  int64_t workspace_bytes;             // of Conv2dArguments::partial
  Conv2dParams params;                 // without the arguments; see with_arguments
};

WeightLayout conv2d_weight_layout(const Conv2dProblem& problem);

// The plan. `kernel` asks for one instantiation by name and `splits` for a number of parts of k; empty
// and 0 leave the choice to a model of the GPU's time. Plans are kept, since planning takes up to 1.5 us of a launch; any
// thread may ask. Throws std::invalid_argument with the reason where no kernel serves the problem.
std::shared_ptr<const Conv2dPlan> plan_conv2d(const Conv2dProblem& problem, const DeviceProperties& device,
                                              const std::string& kernel, int64_t splits);

// A plan's parameters with the arguments filled in.
Conv2dParams with_arguments(const Conv2dPlan& plan, const Conv2dArguments& arguments);

// How many plans are kept.
int64_t kept_conv2d_plans();

// Names of the instantiations that serve the problem on the device, best first by the model.
std::vector<std::string> conv2d_kernels(const Conv2dProblem& problem, const DeviceProperties& device);

}  // namespace resnet_fused
