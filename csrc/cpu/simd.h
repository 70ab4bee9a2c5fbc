// One vector type for the instruction set under compilation, so that each kernel is written once.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END, with RF_ISA naming the namespace, RF_VECTORS the file of the vector type
// and RF_PRODUCTS that of the direct kernels' sums. Another instruction set is another pair of files in simd/, and a source
// file like avx2.cpp.
//
// The direct kernels see activations and weights as 32-bit units: one float32 channel, or a pair of bfloat16 channels.
// Addresses and copies are then the same for both. What a unit is copied from in memory is a Unit: those 32 bits, or a bfloat16
// or float16 channel, which the copy widens.
#pragma once

#include RF_VECTORS

namespace resnet_fused::cpu::RF_ISA {

// Output channels of one panel of packed weights: the two vectors of a register tile.
constexpr int PANEL = 2 * LANES;

}  // namespace resnet_fused::cpu::RF_ISA

#include RF_PRODUCTS

namespace resnet_fused::cpu::RF_ISA {

// Whether activations must be copied before they can be multiplied.
constexpr bool WIDENED = sizeof(Unit) < sizeof(float);

RF_INLINE vec max_magnitude(vec a, vec b) { return larger(magnitude(a), magnitude(b)); }

RF_INLINE float widen(float a) { return a; }
RF_INLINE float widen(Bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Calls body with an element of a dtype.
template <class Body>
RF_INLINE void with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(Bf16{});
    case DType::float16:
      return body(F16{});
  }
}

// A result as it is where stock stores it as T before it goes on with it: beyond float16 it is infinite. It isn't rounded, since
// each rounding adds to the error. Numbers beyond bfloat16 are beyond float32, too.
template <class T>
RF_INLINE vec stored(vec a) {
  if constexpr (std::is_same_v<T, F16>) {
    return infinite_from(a, 65520.0f);  // the smallest number that rounds to infinity
  } else {
    return a;
  }
}

RF_INLINE int64_t vector_count(int64_t channels) { return (channels + LANES - 1) / LANES; }
RF_INLINE int64_t panel_count(int64_t channels) { return (channels + PANEL - 1) / PANEL; }

RF_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
RF_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
RF_INLINE void prefetch_for_write(const void* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace resnet_fused::cpu::RF_ISA
