#include "conv2d_kernels.cuh"

RF_CONV2D_TILES_F16_SM80(RF_CONV2D_KERNEL, bf16, bfloat16)
