// The functions of Activation in float32. NaN and infinities become what they become in PyTorch's own kernels.
#pragma once

#include "activation.h"

namespace resnet_fused {

// max(v, 0) as PyTorch has it: NaN stays NaN, which fmaxf would drop.
__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

__device__ __forceinline__ float clamp_to_6(float v) { return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v; }

// The function of COUNT values; `slope`: of leaky_relu, below zero. Functions that are alike share their code, of which there is
// much in a kernel: the switch is made at run time, since every tile for every function would be ten times the library.
template <int COUNT>
__device__ __forceinline__ void activate(Activation function, float slope, float (&v)[COUNT]) {
  switch (function) {
    case Activation::none:
      return;
    case Activation::relu:
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = relu(v[i]);
      return;
    case Activation::relu6:
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = clamp_to_6(v[i]);
      return;
    case Activation::leaky_relu:
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = v[i] > 0.0f ? v[i] : v[i] * slope;
      return;
    case Activation::hardsigmoid:
    case Activation::hardswish:
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        v[i] = (function == Activation::hardswish ? v[i] : 1.0f) * clamp_to_6(v[i] + 3.0f) * (1.0f / 6.0f);
      return;
    case Activation::gelu:
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = v[i] * 0.5f * (1.0f + erff(v[i] * 0.707106781f));
      return;
    case Activation::sigmoid:
    case Activation::silu:
    case Activation::gelu_tanh:
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        // 1 + tanh(u) = 2 / (1 + e^-2u). At -infinity silu and GELU are -infinity / infinity, a NaN, as PyTorch's are.
        const float cubic = 2.0f * 0.797884561f * __fmaf_rn(0.044715f * v[i] * v[i], v[i], v[i]);
        const float exponent = function == Activation::gelu_tanh ? cubic : v[i];
        v[i] = __fdividef(function == Activation::sigmoid ? 1.0f : v[i], 1.0f + expf(-exponent));
      }
      return;
  }
}

}  // namespace resnet_fused
