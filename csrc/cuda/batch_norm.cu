#include "batch_norm.cuh"
#include "batch_norm_kernels.h"

using resnet_fused::AddReluParams;
using resnet_fused::BatchNormParams;
using resnet_fused::ElementOf;
using resnet_fused::ElementType;

#define RF_KERNEL(NAME, FUNCTION, ELEMENT, VECTOR)                               \
  extern "C" __global__ void __launch_bounds__(resnet_fused::BATCH_NORM_THREADS) \
      NAME(const __grid_constant__ BatchNormParams p) {                          \
    using T = ElementOf<ElementType::ELEMENT>::T;                                \
    resnet_fused::FUNCTION<T, VECTOR ? 16 / int(sizeof(T)) : 1>(p);              \
  }
RF_NORM_KERNELS(RF_KERNEL)

#define RF_FINISH_KERNEL(NAME, FUNCTION)                                         \
  extern "C" __global__ void __launch_bounds__(resnet_fused::BATCH_NORM_THREADS) \
      NAME(const __grid_constant__ BatchNormParams p) {                          \
    resnet_fused::FUNCTION(p);                                                   \
  }
RF_NORM_FINISH_KERNELS(RF_FINISH_KERNEL)

#define RF_ADD_RELU_KERNEL(NAME, FUNCTION, ELEMENT)                                                 \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ AddReluParams p) { \
    resnet_fused::FUNCTION<ElementOf<ElementType::ELEMENT>::T>(p);                                  \
  }
RF_ADD_RELU_KERNELS(RF_ADD_RELU_KERNEL)
