// The extern "C" kernels of csrc/cuda/conv2d_*.cu, one line of conv2d_tiles.h each.
#pragma once

#include "conv2d.cuh"
#include "conv2d_tiles.h"

extern __shared__ __align__(128) unsigned char rf_shared[];

namespace resnet_fused {

// Whether the code being compiled is for a GPU on which the planner launches a kernel that copies in this way.
__host__ __device__ constexpr bool is_for_this_gpu(Copy copy) {
#ifdef __CUDA_ARCH__
  return (copy == Copy::async) == (__CUDA_ARCH__ >= 800);
#else
  return true;
#endif
}

}  // namespace resnet_fused

#define RF_CONV2D_KERNEL(NAME, ELEMENT, GATHER, COPY, BM, BN, BK, WM, WN, STAGES, BLOCKS)                         \
  extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32, BLOCKS)                                  \
      NAME(const __grid_constant__ resnet_fused::Conv2dParams p) {                                                \
    using namespace resnet_fused;                                                                                 \
    if constexpr (is_for_this_gpu(Copy::COPY))                                                                    \
      conv2d_fwd<Conv2dTile<ElementType::ELEMENT, GATHER, Copy::COPY, BM, BN, BK, WM, WN, STAGES>>(p, rf_shared); \
  }
