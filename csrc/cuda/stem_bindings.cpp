// The operators of the stem with its pool, on PyTorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "launch.h"
#include "stem_plan.h"
#include "tensors.h"

namespace resnet_fused {
namespace {

// The integers of stem_plan's `problem`, in order of StemProblem.
StemProblem stem_of(const Ints& v) {
  constexpr size_t COUNT = 5;
  RF_CHECK(v.size() == COUNT, "problem has ", v.size(), " integers; it takes ", COUNT, ", in order of StemProblem");
  return {v[0], v[1], v[2], v[3], ElementType(v[4])};
}

// How x of these strides (N, C, H, W) is read; interleaved only where its pixels' channels are neighbours.
StemInput input_of(const Ints& strides) {
  return strides[1] == 1 && strides[3] == StemPoolTile::INPUT_CHANNELS ? StemInput::interleaved : StemInput::planar;
}

// Of an interleaved image the stride of channels is no matter: rows are copied with all of them.
StemStrides strides_of(const Ints& strides) {
  return {strides[0], input_of(strides) == StemInput::planar ? strides[1] : 0, strides[2]};
}

PlanWords stem_plan_op(Ints problem, Ints strides, Ints device, Ints pointers, int64_t rows) {
  RF_CHECK(pointers.size() == 4, "pointers has ", pointers.size(), " integers; it takes 4: x, weight, bias, y");
  RF_CHECK(strides.size() == 4, "strides has ", strides.size(), " integers; it takes 4, of x");
  const auto pointer = [&](size_t i) {
    return reinterpret_cast<void*>(pointers[i]);
  };
  const StemPlan plan = plan_stem(stem_of(problem), input_of(strides), strides_of(strides), device_of(device), rows);
  return plan_words({plan.launch}, with_pointers(plan, {pointer(0), pointer(1), pointer(2), pointer(3)}), 0);
}

Ints stem_rows_op(Ints problem, Ints device) { return stem_rows(stem_of(problem), StemInput::planar, device_of(device)); }

// Strides of x; none of a dimension of size 1, where any number may stand.
Ints strides_of(const Tensor& x) {
  Ints strides(4);
  for (int64_t dim = 0; dim < 4; ++dim) strides[dim] = x.size(dim) > 1 ? x.stride(dim) : 0;
  return strides;
}

// x as the kernels read it: planar or interleaved, rows at multiples of 16 bytes; a copy only where it isn't already.
Tensor as_image(const Tensor& x) {
  RF_CHECK(x.dim() == 4 && x.size(1) == StemPoolTile::INPUT_CHANNELS, "x must be (N, ", StemPoolTile::INPUT_CHANNELS,
           ", H, W)");
  constexpr int64_t VECTOR = 8;
  const Ints strides = strides_of(x);
  const bool planar = strides[3] == 1 && strides[1] % VECTOR == 0;
  const bool readable = planar || input_of(strides) == StemInput::interleaved;
  if (readable && is_aligned(x) && strides[0] % VECTOR == 0 && strides[2] % VECTOR == 0) return x;
  return as_activation("x", x, x);
}

Tensor stem_fwd_op(const Tensor& x_any, const Tensor& weight, const Tensor& bias, int64_t rows) {
  const Tensor x = as_image(x_any);
  const StemProblem problem{x.size(0), x.size(2), x.size(3), bias.numel(), element_type(x, false)};
  RF_CHECK(weight.scalar_type() == x.scalar_type() && weight.is_contiguous() && is_aligned(weight) &&
               2 * weight.numel() == StemPoolTile::WEIGHT_BYTES,
           "weight has ", weight.numel(), " elements; it must be packed as ", StemPoolTile::WEIGHT_BYTES / 2,
           " contiguous elements of x's dtype");
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && is_aligned(bias),
           "bias must be contiguous float32");
  RF_CHECK(weight.get_device_index() == x.get_device_index() && bias.get_device_index() == x.get_device_index(),
           "weight, bias and x must be on one CUDA device");
  const Ints strides = strides_of(x);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const StemPlan plan = plan_stem(problem, input_of(strides), strides_of(strides), device_properties(device), rows);
  Tensor y = empty_channels_last(x, {problem.batch, problem.out_channels, problem.pooled_height(), problem.pooled_width()});
  StemParams params =
      with_pointers(plan, {x.const_data_ptr(), weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()});
  launch(plan.launch, &params, device);
  return y;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("stem_fwd(Tensor x, Tensor weight, Tensor bias, int rows) -> Tensor");
  m.def("stem_rows(int[] problem, int[] device) -> int[]");
  m.def("stem_plan(int[] problem, int[] strides, int[] device, int[] pointers, int rows) -> (str[], int[], int[], int)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) { m.impl("stem_fwd", TORCH_BOX(&resnet_fused::stem_fwd_op)); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("stem_rows", TORCH_BOX(&resnet_fused::stem_rows_op));
  m.impl("stem_plan", TORCH_BOX(&resnet_fused::stem_plan_op));
}
