// A loop whose index is a constant expression, for the immediate offsets of instructions.
#pragma once

#include <utility>

namespace resnet_fused {

template <int VALUE>
struct Constant {
  __host__ __device__ constexpr operator int() const { return VALUE; }  // as std::integral_constant, for device code
};

template <class F, int... I>
__device__ __forceinline__ void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}

// f(0), ..., f(COUNT - 1), the argument a Constant.
template <int COUNT, class F>
__device__ __forceinline__ void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, COUNT>{});
}

}  // namespace resnet_fused
