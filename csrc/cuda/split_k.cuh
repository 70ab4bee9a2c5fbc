// The second half of a convolution whose k was split: y = relu(sum of the parts + bias + residual), one rounding.
#pragma once

#include "conv2d_params.h"
#include "element.cuh"

namespace resnet_fused {

template <class T>
__device__ __forceinline__ void store_quad(const Conv2dParams& p, const float (&sum)[4], int64_t offset, int channel) {
  struct __align__(4 * sizeof(T)) Quad {
    T elements[4];
  };
  Quad residual{}, y;
  const float4 bias = *reinterpret_cast<const float4*>(p.bias + channel);
  float v[4] = {sum[0] + bias.x, sum[1] + bias.y, sum[2] + bias.z, sum[3] + bias.w};
  if (p.residual != nullptr) {
    residual = *reinterpret_cast<const Quad*>(static_cast<const T*>(p.residual) + offset);
    overflow<T>(v);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float with_residual = v[e] + to_float(residual.elements[e]);
    y.elements[e] = from_float<T>(p.relu ? relu(with_residual) : with_residual);
  }
  *reinterpret_cast<Quad*>(static_cast<T*>(p.y) + offset) = y;
}

// Four channels a thread, grid-stride. The parts are added in order, so that a result doesn't depend on timing.
template <class T>
__device__ __forceinline__ void conv2d_reduce_fwd(const Conv2dParams& p) {
  const int64_t part = int64_t(p.out_pixels) * p.partial_stride;
  const uint32_t quads = uint32_t(p.out_pixels) * p.quads.divisor;  // the planner splits no product of more than 2^31
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < quads; i += gridDim.x * blockDim.x) {
    const uint32_t row = p.quads.quotient(i);
    const int channel = int(i - row * p.quads.divisor) * 4;
    const float* partial = p.partial + int64_t(i) * 4;
    float4 sum = *reinterpret_cast<const float4*>(partial);
    for (int s = 1; s < p.splits; ++s) {
      partial += part;
      const float4 next = *reinterpret_cast<const float4*>(partial);
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    const float v[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t offset = int64_t(row) * p.out_channels + channel;
    if (p.vectorised) {
      store_quad<T>(p, v, offset, channel);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (channel + e >= p.out_channels) continue;
        float y[1] = {v[e] + p.bias[channel + e]};
        if (p.residual != nullptr) {
          overflow<T>(y);
          y[0] += to_float(static_cast<const T*>(p.residual)[offset + e]);
        }
        static_cast<T*>(p.y)[offset + e] = from_float<T>(p.relu ? relu(y[0]) : y[0]);
      }
    }
  }
}

}  // namespace resnet_fused
