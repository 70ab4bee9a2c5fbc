// The element types of the kernels. Plain C++.
#pragma once

#include <cstdint>

namespace resnet_fused {

// float32 is direct float32 arithmetic, tf32 tensor cores on float32 rounded to 10 bits of mantissa.
enum class ElementType : int64_t { float16 = 0, bfloat16 = 1, float32 = 2, tf32 = 3 };

}  // namespace resnet_fused
