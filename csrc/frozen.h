// What the operators of frozen models need on any device (resnet_fused/fusion/freeze.py).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "stable_abi.h"

namespace resnet_fused {

// One of PyTorch's operators, which gives a tensor.
template <class... Args>
torch::stable::Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + ")";
}

// A copy of x with exactly these strides, after a look at whether it is what the model was frozen for. `device`: as the message
// names it; there: whether x is on such a one.
inline torch::stable::Tensor frozen_input_on(const char* device, bool there, const torch::stable::Tensor& x,
                                             const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                             torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> own;
  for (int64_t d = 0; d < x.dim(); ++d) own.push_back(x.size(d));
  RF_CHECK(own == shape && x.scalar_type() == dtype && there, "an input has shape ", text_of(own), " and dtype ",
           torch::headeronly::toString(x.scalar_type()), there ? "" : ", not on ", there ? "" : device,
           "; the model was frozen for ", text_of(shape), " and ", torch::headeronly::toString(dtype), ", on ", device,
           ". Give it such a tensor, or freeze the model for this one.");
  torch::stable::Tensor y = call("aten::empty_strided", "", shape, strides, std::optional(dtype),
                                 std::optional<torch::headeronly::Layout>(), std::optional(x.device()), std::optional<bool>());
  torch::stable::copy_(y, x);
  return y;
}

}  // namespace resnet_fused
