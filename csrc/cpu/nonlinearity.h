// The functions at the end of an epilogue, but for ReLU, which the register tiles apply by a maximum. They are computed on results
// just after these were written, while they lie in L1: the tiles' own code stays as short as it is without them.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

RF_INLINE vec clamp_keeping_nan(vec a, float low, float high) {
  return min_keeping_nan(splat(high), max_keeping_nan(splat(low), a));
}

// e^a to about one unit in the last place; infinity from 88.8 on, and no less than the smallest normal number. NaN stays.
RF_INLINE vec exponential(vec a) {
  a = clamp_keeping_nan(a, -87.33f, 88.8f);
  const vec n = nearest(mul(a, splat(1.44269504f)));
  // ln 2 in two parts, of which the first has few bits, so that its product with n is exact.
  const vec r = fnma(n, splat(-2.12194440e-4f), fnma(n, splat(0.693359375f), a));
  vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, splat(1.0f)));
  return times_power_of_two(p, n);
}

// a / (1 + e^-b). Where a is -inf stock's is NaN, and so is this one: -inf / inf.
RF_INLINE vec times_sigmoid(vec a, vec b) { return divide(a, add(splat(1.0f), exponential(sub(zero(), b)))); }

template <ActivationFunction FUNCTION>
RF_INLINE vec apply(vec a, float slope) {
  if constexpr (FUNCTION == ActivationFunction::relu6) {
    return clamp_keeping_nan(a, 0.0f, 6.0f);
  } else if constexpr (FUNCTION == ActivationFunction::leaky_relu) {
    return fma(min_keeping_nan(zero(), a), splat(slope), max_keeping_nan(zero(), a));
  } else if constexpr (FUNCTION == ActivationFunction::sigmoid) {
    return times_sigmoid(splat(1.0f), a);
  } else if constexpr (FUNCTION == ActivationFunction::silu) {
    return times_sigmoid(a, a);
  } else if constexpr (FUNCTION == ActivationFunction::hardsigmoid) {
    return divide(clamp_keeping_nan(add(a, splat(3.0f)), 0.0f, 6.0f), splat(6.0f));
  } else if constexpr (FUNCTION == ActivationFunction::hardswish) {
    return divide(mul(a, clamp_keeping_nan(add(a, splat(3.0f)), 0.0f, 6.0f)), splat(6.0f));
  } else {
    // 1 + tanh(u) = 2 / (1 + e^-2u)
    const vec cubic = fma(mul(mul(a, a), a), splat(0.044715f), a);
    return times_sigmoid(a, mul(cubic, splat(2.0f * 0.797884561f)));
  }
}

template <ActivationFunction FUNCTION, class T>
void apply_to_rows(T* y, int64_t rows, int64_t stride, int64_t channels, float slope) {
  for (; rows > 0; --rows, y += stride) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) store(y + c, apply<FUNCTION>(load(y + c), slope));
    const int rest = static_cast<int>(channels - c);
    if (rest > 0) store(y + c, apply<FUNCTION>(load(y + c, rest), slope), rest);
  }
}

// What a maximum with this vector does of a function: all of ReLU, and nothing of the others, which are applied afterwards.
RF_INLINE vec floor_of(const Nonlinearity& f) { return f.is(ActivationFunction::relu) ? zero() : splat(-__builtin_inff()); }

template <class T>
void apply_function(const Nonlinearity& f, T* y, int64_t rows, int64_t stride, int64_t channels) {
  using Function = ActivationFunction;
  const auto run = [&](auto function) {
    apply_to_rows<decltype(function)::value>(y, rows, stride, channels, f.slope);
  };
  switch (f.function) {
    case Function::none:
    case Function::relu:
      return;
    case Function::relu6:
      return run(std::integral_constant<Function, Function::relu6>{});
    case Function::leaky_relu:
      return run(std::integral_constant<Function, Function::leaky_relu>{});
    case Function::sigmoid:
      return run(std::integral_constant<Function, Function::sigmoid>{});
    case Function::silu:
      return run(std::integral_constant<Function, Function::silu>{});
    case Function::hardsigmoid:
      return run(std::integral_constant<Function, Function::hardsigmoid>{});
    case Function::hardswish:
      return run(std::integral_constant<Function, Function::hardswish>{});
    case Function::gelu_tanh:
      return run(std::integral_constant<Function, Function::gelu_tanh>{});
  }
}

// Applies what `floor_of` left to results that were written: `channels` neighbouring ones of each of `rows` pixels.
template <class T>
RF_INLINE void apply_nonlinearity(const Nonlinearity& f, T* y, int64_t rows, int64_t stride, int64_t channels) {
  if (!f.is(ActivationFunction::none) && !f.is(ActivationFunction::relu)) apply_function(f, y, rows, stride, channels);
}

}  // namespace resnet_fused::cpu::RF_ISA
