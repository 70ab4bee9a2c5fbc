// The operators of convolution, and the namespace resnet_fused_cuda, on PyTorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "conv2d_plan.h"
#include "launch.h"
#include "tensors.h"

namespace resnet_fused {
namespace {

// The integers of conv2d_plan's `problem`, in order of Conv2dProblem.
Conv2dProblem problem_of(const Ints& v) {
  constexpr size_t COUNT = 14;
  RF_CHECK(v.size() == COUNT, "problem has ", v.size(), " integers; it takes ", COUNT, ", in order of Conv2dProblem");
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], ElementType(v[13])};
}

std::string describe(const Conv2dProblem& p) {
  return message("conv2d of ", p.batch, "x", p.channels, "x", p.height, "x", p.width, " to ", p.out_channels,
                 " channels, filter ", p.kernel_h, "x", p.kernel_w, ", stride ", p.stride_h, "x", p.stride_w, ", padding ",
                 p.pad_h, "x", p.pad_w);
}

Ints conv2d_weight_layout_op(Ints problem) {
  const WeightLayout layout = conv2d_weight_layout(problem_of(problem));
  return {layout.filter_rows, layout.runs, layout.lead, layout.run_length, layout.padded_run_length};
}

std::vector<std::string> conv2d_kernels_op(Ints problem, Ints device) {
  return conv2d_kernels(problem_of(problem), device_of(device));
}

// Properties of a CUDA device in order of DeviceProperties, as launches read them.
Ints device_properties_op(int64_t device) {
  const DeviceProperties& p = device_properties(int32_t(device));
  return {p.compute_capability, p.multiprocessors, p.shared_per_block, p.shared_per_multiprocessor};
}

PlanWords conv2d_plan_op(Ints problem, Ints device, Ints pointers, std::string activation, double slope, std::string kernel,
                         int64_t splits) {
  RF_CHECK(pointers.size() == 6, "pointers has ", pointers.size(),
           " integers; it takes 6: x, weight, bias, residual, y, partial");
  const auto pointer = [&](size_t i) {
    return reinterpret_cast<void*>(pointers[i]);
  };
  const Conv2dArguments arguments{
      pointer(0), pointer(1), pointer(2), pointer(3), pointer(4), pointer(5), activation_of(activation), float(slope)};
  const auto plan = plan_conv2d(problem_of(problem), device_of(device), kernel, splits);
  return plan_words(plan->launches, with_arguments(*plan, arguments), plan->workspace_bytes);
}

Tensor conv2d_fwd_op(const Tensor& x_any, const Tensor& weight, const Tensor& bias, std::optional<Tensor> residual_any,
                     Ints geometry, std::string activation, double slope, bool tf32, std::string kernel, int64_t splits) {
  RF_CHECK(geometry.size() == 8, "geometry has ", geometry.size(),
           " integers; it takes kernel, stride, padding, dilation, 2 each");
  const Tensor x = as_activation("x", x_any, x_any);
  const auto& g = geometry;
  const Conv2dProblem problem{x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), g[0], g[1],
                              g[2],      g[3],      g[4],      g[5],      g[6],           g[7], element_type(x, tf32)};
  const WeightLayout layout = conv2d_weight_layout(problem);
  RF_CHECK(weight.scalar_type() == x.scalar_type() && weight.is_contiguous() && weight.dim() == 4 && is_aligned(weight) &&
               weight.size(1) == layout.filter_rows && weight.size(2) == layout.runs &&
               weight.size(3) == layout.padded_run_length,
           "weight must be packed for ", describe(problem), " as a contiguous (", weight.size(0), ", ", layout.filter_rows,
           ", ", layout.runs, ", ", layout.padded_run_length, ") of x's dtype; see resnet_fused_cuda::conv2d_weight_layout");
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == problem.out_channels &&
               is_aligned(bias),
           "bias must be ", problem.out_channels, " contiguous float32");
  RF_CHECK(weight.get_device_index() == x.get_device_index() && bias.get_device_index() == x.get_device_index(),
           "weight, bias and x must be on one CUDA device");
  Tensor y = empty_channels_last(x, {problem.batch, problem.out_channels, problem.out_height(), problem.out_width()});
  std::optional<Tensor> residual;
  if (residual_any.has_value()) {
    residual = as_activation("residual", *residual_any, x);
    for (int64_t i = 0; i < 4; ++i)
      RF_CHECK(residual->size(i) == y.size(i), "residual has size ", residual->size(i), " in dimension ", i, ", the result ",
               y.size(i));
  }
  if (y.numel() == 0) return y;

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Conv2dArguments arguments{x.const_data_ptr(),        weight.const_data_ptr(),
                            bias.const_data_ptr(),     residual ? residual->const_data_ptr() : nullptr,
                            y.mutable_data_ptr(),      nullptr,
                            activation_of(activation), float(slope)};
  const auto plan = plan_conv2d(problem, device_properties(device), kernel, splits);
  std::optional<Tensor> workspace;  // lives until the launches are queued; the allocator keeps its memory for this stream
  if (plan->workspace_bytes > 0) {
    workspace =
        torch::stable::empty({plan->workspace_bytes / int64_t(sizeof(float))}, ScalarType::Float, std::nullopt, x.device());
    arguments.partial = workspace->mutable_data_ptr();
  }
  Conv2dParams params = with_arguments(*plan, arguments);
  try {
    for (const KernelLaunch& l : plan->launches) launch(l, &params, device);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(message(describe(problem), ": ", error.what()));
  }
  return y;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY(resnet_fused_cuda, m) {
  m.def(
      "conv2d_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] geometry, str activation, float slope, "
      "bool tf32, str kernel, int splits) -> Tensor");
  m.def("device_properties(int device) -> int[]");
  m.def("conv2d_kept_plans() -> int");
  m.def("conv2d_weight_layout(int[] problem) -> int[]");
  m.def("conv2d_kernels(int[] problem, int[] device) -> str[]");
  m.def(
      "conv2d_plan(int[] problem, int[] device, int[] pointers, str activation, float slope, str kernel, int splits) -> "
      "(str[], int[], int[], int)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) { m.impl("conv2d_fwd", TORCH_BOX(&resnet_fused::conv2d_fwd_op)); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_properties", TORCH_BOX(&resnet_fused::device_properties_op));
  m.impl("conv2d_weight_layout", TORCH_BOX(&resnet_fused::conv2d_weight_layout_op));
  m.impl("conv2d_kernels", TORCH_BOX(&resnet_fused::conv2d_kernels_op));
  m.impl("conv2d_kept_plans", TORCH_BOX(&resnet_fused::kept_conv2d_plans));
  m.impl("conv2d_plan", TORCH_BOX(&resnet_fused::conv2d_plan_op));
}
