// The instantiations of the convolution kernels, listed once: conv2d_*.cu compile them, the planner chooses among them.
#pragma once

// X(name, element, gather, BLOCK_M, BLOCK_N, BLOCK_K, WARP_M, WARP_N, stages, blocks per SM that its registers must allow).
// gather: runs of x in no whole 16 bytes, loaded by element. 256x64 is for the 64 channels of a ResNet's first stage.
#define RESNET_FUSED_CONV2D_TILES_16BIT(X, SUFFIX, ELEMENT)                           \
  X(conv2d_fwd_##SUFFIX##_128x256x32, ELEMENT, false, 128, 256, 32, 64, 64, 3, 1)     \
  X(conv2d_fwd_##SUFFIX##_256x128x32, ELEMENT, false, 256, 128, 32, 64, 64, 3, 1)     \
  X(conv2d_fwd_##SUFFIX##_128x128x64, ELEMENT, false, 128, 128, 64, 64, 64, 3, 1)     \
  X(conv2d_fwd_##SUFFIX##_128x128x32, ELEMENT, false, 128, 128, 32, 64, 64, 4, 2)     \
  X(conv2d_fwd_##SUFFIX##_256x64x32, ELEMENT, false, 256, 64, 32, 64, 64, 4, 2)       \
  X(conv2d_fwd_##SUFFIX##_128x64x32, ELEMENT, false, 128, 64, 32, 64, 32, 4, 3)       \
  X(conv2d_fwd_##SUFFIX##_64x64x64, ELEMENT, false, 64, 64, 64, 32, 32, 4, 3)         \
  X(conv2d_fwd_##SUFFIX##_gather_128x64x32, ELEMENT, true, 128, 64, 32, 64, 32, 4, 2)

#define RESNET_FUSED_CONV2D_TILES_TF32(X)                                             \
  X(conv2d_fwd_tf32_128x128x16, kTf32, false, 128, 128, 16, 64, 64, 4, 2)             \
  X(conv2d_fwd_tf32_128x64x16, kTf32, false, 128, 64, 16, 64, 32, 4, 3)               \
  X(conv2d_fwd_tf32_64x64x32, kTf32, false, 64, 64, 32, 32, 32, 4, 3)                 \
  X(conv2d_fwd_tf32_gather_128x64x16, kTf32, true, 128, 64, 16, 64, 32, 4, 2)

#define RESNET_FUSED_CONV2D_TILES(X)                      \
  RESNET_FUSED_CONV2D_TILES_16BIT(X, f16, kFloat16)       \
  RESNET_FUSED_CONV2D_TILES_16BIT(X, bf16, kBFloat16)     \
  RESNET_FUSED_CONV2D_TILES_TF32(X)
