// The extern "C" kernels of csrc/cuda/conv2d_*.cu, one line of conv2d_tiles.h each.
#pragma once

#include "conv2d.cuh"
#include "conv2d_tiles.h"

extern __shared__ __align__(128) unsigned char resnet_fused_shared[];

// The body is empty below sm_80, where the planner never launches it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RESNET_FUSED_CONV2D_BODY(...)
#else
#define RESNET_FUSED_CONV2D_BODY(...) resnet_fused::conv2d_fwd<__VA_ARGS__>(p, resnet_fused_shared)
#endif

#define RESNET_FUSED_CONV2D_KERNEL(NAME, ELEMENT, GATHER, BM, BN, BK, WM, WN, STAGES, BLOCKS)                              \
  extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32, BLOCKS)                                          \
      NAME(const __grid_constant__ resnet_fused::Conv2dParams p) {                                                        \
    using T = resnet_fused::ElementOf<resnet_fused::ElementType::ELEMENT>::T;                                              \
    RESNET_FUSED_CONV2D_BODY(resnet_fused::Conv2dTile<T, GATHER, BM, BN, BK, WM, WN, STAGES>);                             \
  }
