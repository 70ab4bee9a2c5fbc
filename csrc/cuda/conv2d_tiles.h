// The instantiations of the convolution kernels, listed once: conv2d_*.cu compile them, the planner chooses among them.
#pragma once

#include "conv2d_params.h"

// X(name, element, gather, copy, BLOCK_M, BLOCK_N, BLOCK_K, WARP_M, WARP_N, stages, blocks per SM that its registers
// allow). gather: runs of x in no whole 16 bytes, loaded by element. copy: kAsync for sm_80 on, kThroughRegisters for
// sm_75. 256x64 is for the 64 channels of a ResNet's first stage.
#define RESNET_FUSED_CONV2D_TILES_F16_SM80(X, SUFFIX, ELEMENT)                            \
  X(conv2d_fwd_##SUFFIX##_128x256x32, ELEMENT, false, kAsync, 128, 256, 32, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_256x128x32, ELEMENT, false, kAsync, 256, 128, 32, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_128x128x64, ELEMENT, false, kAsync, 128, 128, 64, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_128x128x32, ELEMENT, false, kAsync, 128, 128, 32, 64, 64, 4, 2) \
  X(conv2d_fwd_##SUFFIX##_256x64x32, ELEMENT, false, kAsync, 256, 64, 32, 64, 64, 4, 2)   \
  X(conv2d_fwd_##SUFFIX##_128x64x32, ELEMENT, false, kAsync, 128, 64, 32, 64, 32, 4, 3)   \
  X(conv2d_fwd_##SUFFIX##_64x64x64, ELEMENT, false, kAsync, 64, 64, 64, 32, 32, 4, 3)     \
  X(conv2d_fwd_##SUFFIX##_gather_128x64x32, ELEMENT, true, kAsync, 128, 64, 32, 64, 32, 4, 2)

#define RESNET_FUSED_CONV2D_TILES_F16_SM75(X)                                                       \
  X(conv2d_fwd_f16_sm75_128x128x32, kFloat16, false, kThroughRegisters, 128, 128, 32, 64, 32, 2, 1) \
  X(conv2d_fwd_f16_sm75_64x64x32, kFloat16, false, kThroughRegisters, 64, 64, 32, 32, 32, 2, 3)     \
  X(conv2d_fwd_f16_sm75_gather_128x64x32, kFloat16, true, kThroughRegisters, 128, 64, 32, 64, 32, 2, 2)

#define RESNET_FUSED_CONV2D_TILES_F32(X)                                                          \
  X(conv2d_fwd_tf32_128x128x16, kTf32, false, kAsync, 128, 128, 16, 64, 64, 4, 2)                 \
  X(conv2d_fwd_tf32_128x64x16, kTf32, false, kAsync, 128, 64, 16, 64, 32, 4, 3)                   \
  X(conv2d_fwd_tf32_64x64x32, kTf32, false, kAsync, 64, 64, 32, 32, 32, 4, 3)                     \
  X(conv2d_fwd_tf32_gather_128x64x16, kTf32, true, kAsync, 128, 64, 16, 64, 32, 4, 2)             \
  X(conv2d_fwd_f32_128x64x16, kFloat32, false, kAsync, 128, 64, 16, 64, 32, 4, 2)                 \
  X(conv2d_fwd_f32_64x64x16, kFloat32, false, kAsync, 64, 64, 16, 32, 32, 4, 3)                   \
  X(conv2d_fwd_f32_gather_128x64x16, kFloat32, true, kAsync, 128, 64, 16, 64, 32, 4, 2)           \
  X(conv2d_fwd_f32_sm75_128x64x16, kFloat32, false, kThroughRegisters, 128, 64, 16, 64, 32, 2, 2) \
  X(conv2d_fwd_f32_sm75_gather_128x64x16, kFloat32, true, kThroughRegisters, 128, 64, 16, 64, 32, 2, 2)

#define RESNET_FUSED_CONV2D_TILES(X)                     \
  RESNET_FUSED_CONV2D_TILES_F16_SM80(X, f16, kFloat16)   \
  RESNET_FUSED_CONV2D_TILES_F16_SM80(X, bf16, kBFloat16) \
  RESNET_FUSED_CONV2D_TILES_F16_SM75(X)                  \
  RESNET_FUSED_CONV2D_TILES_F32(X)

namespace resnet_fused {

// The stem's kernel: 7x7, stride 2, padding 3, 3 channels of 16 bits. A block computes kTile x kTile pixels of
// kChannels channels, each of its warps two rows of pixels, from a patch of x and all their weights in shared memory.
struct StemTile {
  static constexpr int kTile = 16, kChannels = 64, kWarps = kTile / 2, kThreads = 32 * kWarps;
  static constexpr int kFilter = 7, kStride = 2, kPad = 3, kInputChannels = 3;
  static constexpr int kRun = 24, kBlocksPerRow = kRun / 8;            // elements and mma blocks of 8 of a filter row
  static constexpr int kMmaSteps = (kFilter * kBlocksPerRow + 1) / 2;  // of two blocks
  static constexpr int kLeft = 16;  // elements of x, whole 16 bytes, before the centre tap
  static constexpr int kFirst =
      kLeft - kPad * kInputChannels - kRunLead;  // where the first window begins in a patch row
  static constexpr int kPatchRows = kStride * (kTile - 1) + kFilter;
  // Of a patch row; an even number, so that whole sectors of 32 bytes are read.
  static constexpr int kPatchChunks = (kFirst + kStride * kInputChannels * (kTile - 1) + kRun + 15) / 16 * 2;
  static constexpr int kPatchRowBytes = kPatchChunks * 16, kPatchBytes = kPatchRows * kPatchRowBytes;
  static constexpr int kWeightChunks = 23, kWeightRowBytes = kWeightChunks * 16;  // odd: ldmatrix meets no bank twice
  static constexpr int kStripBytes = 16 * kChannels * 4;                          // of the epilogue, a warp
  static constexpr int kOperandBytes = kPatchBytes + kChannels * kWeightRowBytes;
  static constexpr int kSharedBytes = kOperandBytes > kWarps* kStripBytes ? kOperandBytes : kWarps * kStripBytes;
  static_assert(kFirst % 2 == 0, "pairs of elements are aligned words");
  static_assert(kWeightChunks * 8 >= kMmaSteps * 16 && kWeightChunks % 2 == 1);
};

}  // namespace resnet_fused
