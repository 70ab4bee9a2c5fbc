// The element types of the kernels. Plain C++.
#pragma once

#include <cstdint>

namespace resnet_fused {

// kFloat32 is direct float32 arithmetic, kTf32 tensor cores on float32 rounded to 10 bits of mantissa.
enum class ElementType : int64_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kTf32 = 3 };

}  // namespace resnet_fused
