// What follows the sums of four neighbouring channels, for any function and any number of channels.
#pragma once

#include "conv2d_params.h"
#include "element.cuh"

namespace resnet_fused {

template <class T>
struct __align__(4 * sizeof(T)) Quad {
  T elements[4];
};

// Stores y = activation(v + bias + residual) of four channels from `channel` on, those that there are, at `offset` of y.
template <class T>
__device__ __forceinline__ void store_quad(const Conv2dParams& p, float (&v)[4], int64_t offset, int channel) {
  const T* residual_ptr = static_cast<const T*>(p.residual) + offset;
  T* y_ptr = static_cast<T*>(p.y) + offset;
  const int count = p.out_channels - channel;
  Quad<T> residual{}, y;
  if (p.vectorised) {
    const float4 bias = *reinterpret_cast<const float4*>(p.bias + channel);
    v[0] += bias.x, v[1] += bias.y, v[2] += bias.z, v[3] += bias.w;
    if (p.residual != nullptr) residual = *reinterpret_cast<const Quad<T>*>(residual_ptr);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e >= count) continue;
      v[e] += p.bias[channel + e];
      if (p.residual != nullptr) residual.elements[e] = residual_ptr[e];
    }
  }
  if (p.residual != nullptr) overflow<T>(v);
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] += to_float(residual.elements[e]);
  if (p.activation > Activation::relu) overflow<T>(v);
  activate(p.activation, p.slope, v);
#pragma unroll
  for (int e = 0; e < 4; ++e) y.elements[e] = from_float<T>(v[e]);
  if (p.vectorised) {
    *reinterpret_cast<Quad<T>*>(y_ptr) = y;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < count) y_ptr[e] = y.elements[e];
  }
}

}  // namespace resnet_fused
