#include "block_kernels.cuh"

RF_BOTTLENECK_KERNELS(RF_BOTTLENECK_KERNEL, f16, float16)
