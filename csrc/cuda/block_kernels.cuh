// The extern "C" kernels of csrc/cuda/block_*.cu, one line of block_tiles.h each.
#pragma once

#include "bottleneck.cuh"

extern __shared__ __align__(128) unsigned char rf_shared[];

// The planner launches these from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RF_BLOCK_BODY(BLOCK, ELEMENT, ...)
#else
#define RF_BLOCK_BODY(BLOCK, ELEMENT, ...) \
  BLOCK<ElementOf<ElementType::ELEMENT>::T, __VA_ARGS__>(p, ptx::shared_address(rf_shared)).run()
#endif

#define RF_BOTTLENECK_KERNEL(NAME, ELEMENT, IN, WIDTH, PROJECTED, RESIDENT, WARPS, BLOCKS)                                     \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) NAME(const __grid_constant__ resnet_fused::BlockParams p) { \
    using namespace resnet_fused;                                                                                              \
    RF_BLOCK_BODY(Bottleneck, ELEMENT, BottleneckTile<IN, WIDTH, PROJECTED, RESIDENT, WARPS>);                                 \
  }
