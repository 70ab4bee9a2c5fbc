#include "split_k.cuh"

using resnet_fused::Conv2dParams;

extern "C" __global__ void __launch_bounds__(256) conv2d_reduce_fwd_f16(const __grid_constant__ Conv2dParams p) {
  resnet_fused::conv2d_reduce_fwd<__half>(p);
}
extern "C" __global__ void __launch_bounds__(256) conv2d_reduce_fwd_bf16(const __grid_constant__ Conv2dParams p) {
  resnet_fused::conv2d_reduce_fwd<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(256) conv2d_reduce_fwd_f32(const __grid_constant__ Conv2dParams p) {
  resnet_fused::conv2d_reduce_fwd<float>(p);
}
