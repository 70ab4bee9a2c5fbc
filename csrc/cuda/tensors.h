// Tensors as the kernels take them, and plans as the tests read them. On PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "plan.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline ElementType element_type(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return ElementType::float16;
    case ScalarType::BFloat16:
      return ElementType::bfloat16;
    case ScalarType::Float:
      return tf32 ? ElementType::tf32 : ElementType::float32;
    default:
      throw std::invalid_argument("x has a dtype that the CUDA kernels don't serve; use float16, bfloat16 or float32");
  }
}

// Dense in the order N, H, W, C; the strides of dimensions of size 1 don't matter.
inline bool is_channels_last(const Tensor& t) {
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  const auto fits = [&](int64_t dim, int64_t size, int64_t stride) {
    return size <= 1 || t.stride(dim) == stride;
  };
  return fits(1, c, 1) && fits(3, w, c) && fits(2, h, w * c) && fits(0, n, h * w * c);
}

inline bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

inline Tensor empty_channels_last(const Tensor& like, const Ints& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// An activation in the layout and alignment that the kernels read; a copy only where it isn't already.
inline Tensor as_activation(const char* name, const Tensor& t, const Tensor& like) {
  RF_CHECK(t.dim() == 4, name, " has ", t.dim(), " dimensions; it must be (N, C, H, W)");
  RF_CHECK(t.get_device_index() == like.get_device_index(), name, " is on CUDA device ", t.get_device_index(), ", x on ",
           like.get_device_index(), "; move them to one device");
  RF_CHECK(t.scalar_type() == like.scalar_type(), name, " and x differ in dtype; cast one of them");
  if (is_channels_last(t) && is_aligned(t)) return t;
  Tensor copy = empty_channels_last(t, Ints(t.sizes().begin(), t.sizes().end()));
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor empty_floats(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, like.device());
}

inline DeviceProperties device_of(const Ints& v) {
  RF_CHECK(v.size() == 4, "device has ", v.size(), " integers; it takes 4: compute capability, multiprocessors, ",
           "shared bytes per block and per multiprocessor");
  return {v[0], v[1], v[2], v[3]};
}

// A plan: kernel names; five integers a launch (grid, block, shared bytes); the parameter struct in 8-byte words;
// workspace bytes.
using PlanWords = std::tuple<std::vector<std::string>, Ints, Ints, int64_t>;

template <class Params>
PlanWords plan_words(const std::vector<KernelLaunch>& plan, const Params& params, int64_t workspace_bytes) {
  std::vector<std::string> names;
  Ints launches;
  for (const KernelLaunch& l : plan) {
    names.push_back(l.kernel);
    launches.insert(launches.end(), {l.grid[0], l.grid[1], l.grid[2], l.block, l.shared_bytes});
  }
  static_assert(sizeof(Params) % sizeof(int64_t) == 0);
  Ints words(sizeof(Params) / sizeof(int64_t));
  std::memcpy(words.data(), &params, sizeof params);
  return {names, launches, words, workspace_bytes};
}

}  // namespace resnet_fused
