// Arithmetic on the element types of the kernels: 16 bytes of them to and from float32, and ReLU that keeps NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "activation.cuh"
#include "element_type.h"
#include "ptx.cuh"

namespace resnet_fused {

template <ElementType>
struct ElementOf;
template <>
struct ElementOf<ElementType::float16> {
  using T = __half;
};
template <>
struct ElementOf<ElementType::bfloat16> {
  using T = __nv_bfloat16;
};
template <>
struct ElementOf<ElementType::float32> {
  using T = float;
};
template <>
struct ElementOf<ElementType::tf32> {
  using T = float;
};

// Explicit conversions: PyTorch compiles extensions with the implicit ones of half types switched off.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// Sums with an infinity where PyTorch has one: it stores them as T before it adds a residual. They are looked at
// together, since hardly ever is one beyond float16.
template <class T, int COUNT>
__device__ __forceinline__ void overflow(float (&v)[COUNT]) {
  if constexpr (std::is_same_v<T, __half>) {
    constexpr float INFINITE = 65520.0f;  // the smallest number that rounds to infinity
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = fmaxf(largest, fabsf(v[i]));
    if (largest < INFINITE) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = fabsf(v[i]) < INFINITE ? v[i] : v[i] * __int_as_float(0x7f800000);
  }
}

// Two elements of T in a word, the first in its lower half; each is rounded once.
template <class T>
__device__ __forceinline__ uint32_t to_word(float low, float high) {
  static_assert(sizeof(T) == 2);
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

// The sums of two words' elements, rounded once each, as PyTorch adds tensors.
template <class T>
__device__ __forceinline__ uint32_t add_words(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair first, second;
  memcpy(&first, &a, sizeof a), memcpy(&second, &b, sizeof b);
  const Pair sum = __hadd2(first, second);
  uint32_t word;
  memcpy(&word, &sum, sizeof word);
  return word;
}

// 16 bytes of elements of type T, as COUNT floats and back with one rounding each.
template <class T>
struct Vector16 {
  static constexpr int COUNT = 16 / sizeof(T);

  __device__ static void unpack(uint4 bits, float (&v)[COUNT]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (COUNT == 4) {
        v[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = to_floats(words[i], T{});
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ static uint4 pack(const float (&v)[COUNT]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (COUNT == 4) {
        words[i] = __float_as_uint(v[i]);
      } else {
        words[i] = to_word<T>(v[2 * i], v[2 * i + 1]);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // Rounding keeps order, so ReLU of the rounded value is the rounded ReLU.
  __device__ static uint4 relu(uint4 v) {
    return {ptx::relu_word<T>(v.x), ptx::relu_word<T>(v.y), ptx::relu_word<T>(v.z), ptx::relu_word<T>(v.w)};
  }

  __device__ static uint4 from_elements(const T (&elements)[COUNT]) {
    uint4 bits;
    memcpy(&bits, elements, sizeof bits);
    return bits;
  }

 private:
  __device__ static float2 to_floats(uint32_t word, __half) { return __half22float2(bit_cast<__half2>(word)); }
  __device__ static float2 to_floats(uint32_t word, __nv_bfloat16) {  // the upper half of a float32
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  template <class To, class From>
  __device__ static To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
  }
};

}  // namespace resnet_fused
