#include "conv2d_stem.cuh"

extern __shared__ __align__(128) unsigned char rf_shared[];

// The planner launches these from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RF_STEM_BODY(T)
#else
#define RF_STEM_BODY(T) resnet_fused::conv2d_stem_fwd<T>(p, rf_shared)
#endif

extern "C" __global__ void __launch_bounds__(256, 2) conv2d_stem_fwd_f16(const __grid_constant__ resnet_fused::Conv2dParams p) {
  RF_STEM_BODY(__half);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    conv2d_stem_fwd_bf16(const __grid_constant__ resnet_fused::Conv2dParams p) {
  RF_STEM_BODY(__nv_bfloat16);
}
