// What all planners speak of: element types, devices and launches. Plain C++.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "element_type.h"

namespace resnet_fused {

struct DeviceProperties {
  int64_t compute_capability;  // 10 major + minor
  int64_t multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes a block may ask for; bytes there are
};

struct KernelLaunch {
  std::string kernel;  // its extern "C" name
  uint32_t grid[3];
  uint32_t block;
  uint32_t shared_bytes;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t element_bytes(ElementType type) {
  return type == ElementType::float16 || type == ElementType::bfloat16 ? 2 : 4;
}

// As kernels of activations are named after it.
inline const char* suffix(ElementType type) {
  switch (type) {
    case ElementType::float16:
      return "f16";
    case ElementType::bfloat16:
      return "bf16";
    case ElementType::float32:
    case ElementType::tf32:
      return "f32";
  }
  throw std::invalid_argument("unknown element type");
}

}  // namespace resnet_fused
