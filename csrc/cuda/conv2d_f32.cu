#include "conv2d_kernels.cuh"

RF_CONV2D_TILES_F32(RF_CONV2D_KERNEL)
