// The operators of whole residual blocks, on PyTorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "../checks.h"
#include "block_plan.h"
#include "launch.h"
#include "tensors.h"

namespace resnet_fused {
namespace {

// The integers of block_plan's `problem`, in order of BlockProblem.
BlockProblem block_of(const Ints& v) {
  constexpr size_t COUNT = 8;
  RF_CHECK(v.size() == COUNT, "problem has ", v.size(), " integers; it takes ", COUNT, ", in order of BlockProblem");
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6] != 0, ElementType(v[7])};
}

PlanWords block_plan_op(Ints problem, Ints device, Ints pointers, std::string kernel) {
  RF_CHECK(pointers.size() == 4, "pointers has ", pointers.size(), " integers; it takes 4: x, weight, bias, y");
  const auto pointer = [&](size_t i) {
    return reinterpret_cast<void*>(pointers[i]);
  };
  const BlockPlan plan = plan_block(block_of(problem), device_of(device), kernel);
  return plan_words({plan.launch}, with_pointers(plan, {pointer(0), pointer(1), pointer(2), pointer(3)}), 0);
}

std::vector<std::string> block_kernels_op(Ints problem, Ints device) {
  return block_kernels(block_of(problem), device_of(device));
}

Tensor block_fwd_op(const Tensor& x_any, const Tensor& weight, const Tensor& bias, int64_t inner_channels, int64_t out_channels,
                    bool projected, std::string kernel) {
  const Tensor x = as_activation("x", x_any, x_any);
  const BlockProblem problem{x.size(0),      x.size(2),    x.size(3), x.size(1),
                             inner_channels, out_channels, projected, element_type(x, false)};
  RF_CHECK(weight.scalar_type() == x.scalar_type() && weight.is_contiguous() && is_aligned(weight) &&
               2 * weight.numel() == block_weight_bytes(problem),
           "weight has ", weight.numel(), " elements; it must be packed for ", problem.channels, " -> ", inner_channels, " -> ",
           out_channels, " channels as ", block_weight_bytes(problem) / 2, " contiguous elements of x's dtype");
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && is_aligned(bias) &&
               bias.numel() == block_bias_floats(problem),
           "bias has ", bias.numel(), " elements; it must be ", block_bias_floats(problem), " contiguous float32");
  RF_CHECK(weight.get_device_index() == x.get_device_index() && bias.get_device_index() == x.get_device_index(),
           "weight, bias and x must be on one CUDA device");
  Tensor y = empty_channels_last(x, {problem.batch, out_channels, problem.height, problem.width});
  if (y.numel() == 0) return y;
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const BlockPlan plan = plan_block(problem, device_properties(device), kernel);
  BlockParams params =
      with_pointers(plan, {x.const_data_ptr(), weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()});
  launch(plan.launch, &params, device);
  return y;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "block_fwd(Tensor x, Tensor weight, Tensor bias, int inner_channels, int out_channels, bool projected, str kernel) -> "
      "Tensor");
  m.def("block_kernels(int[] problem, int[] device) -> str[]");
  m.def("block_plan(int[] problem, int[] device, int[] pointers, str kernel) -> (str[], int[], int[], int)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) { m.impl("block_fwd", TORCH_BOX(&resnet_fused::block_fwd_op)); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("block_kernels", TORCH_BOX(&resnet_fused::block_kernels_op));
  m.impl("block_plan", TORCH_BOX(&resnet_fused::block_plan_op));
}
