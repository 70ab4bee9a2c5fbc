// The second half of a convolution whose k was split: y = activation(sum of the parts + bias + residual), one rounding.
#pragma once

#include "conv2d_params.h"
#include "store_quad.cuh"

namespace resnet_fused {

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
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    store_quad<T>(p, v, int64_t(row) * p.out_channels + channel, channel);
  }
}

}  // namespace resnet_fused
