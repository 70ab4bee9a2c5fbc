#include "block_kernels.cuh"

RF_BOTTLENECK_KERNELS(RF_BOTTLENECK_KERNEL, bf16, bfloat16)
