// What frozen models need on a GPU beside the kernels' own operators, which are functions of tensors as they stand.
#include "../frozen.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "tensors.h"

namespace resnet_fused {
namespace {

// x with exactly these strides, after a look at whether it is what the model was frozen for.
Tensor frozen_input(Tensor x, Ints shape, Ints strides, ScalarType dtype) {
  return frozen_input_on("a GPU", x.is_cuda(), x, shape, strides, dtype);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("frozen_input(Tensor x, int[] shape, int[] strides, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("frozen_input", TORCH_BOX(&resnet_fused::frozen_input));
}
