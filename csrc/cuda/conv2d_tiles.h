// The instantiations of the convolution kernels, listed once: conv2d_*.cu compile them, the planner chooses among them.
#pragma once

#include "conv2d_params.h"

// X(name, element, gather, copy, BLOCK_M, BLOCK_N, BLOCK_K, WARP_M, WARP_N, stages, blocks per SM that its registers
// allow). gather: runs of x in no whole 16 bytes, loaded by element. copy: async for sm_80 on, through_registers for
// sm_75. 256x64 is for the 64 channels of a ResNet's first stage.
#define RF_CONV2D_TILES_F16_SM80(X, SUFFIX, ELEMENT)                                     \
  X(conv2d_fwd_##SUFFIX##_128x256x32, ELEMENT, false, async, 128, 256, 32, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_256x128x32, ELEMENT, false, async, 256, 128, 32, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_128x128x64, ELEMENT, false, async, 128, 128, 64, 64, 64, 3, 1) \
  X(conv2d_fwd_##SUFFIX##_128x128x32, ELEMENT, false, async, 128, 128, 32, 64, 64, 4, 2) \
  X(conv2d_fwd_##SUFFIX##_256x64x32, ELEMENT, false, async, 256, 64, 32, 64, 64, 4, 2)   \
  X(conv2d_fwd_##SUFFIX##_128x64x32, ELEMENT, false, async, 128, 64, 32, 64, 32, 4, 3)   \
  X(conv2d_fwd_##SUFFIX##_64x64x64, ELEMENT, false, async, 64, 64, 64, 32, 32, 4, 3)     \
  X(conv2d_fwd_##SUFFIX##_gather_128x64x32, ELEMENT, true, async, 128, 64, 32, 64, 32, 4, 2)

#define RF_CONV2D_TILES_F16_SM75(X)                                                                \
  X(conv2d_fwd_f16_sm75_128x128x32, float16, false, through_registers, 128, 128, 32, 64, 32, 2, 1) \
  X(conv2d_fwd_f16_sm75_64x64x32, float16, false, through_registers, 64, 64, 32, 32, 32, 2, 3)     \
  X(conv2d_fwd_f16_sm75_gather_128x64x32, float16, true, through_registers, 128, 64, 32, 64, 32, 2, 2)

#define RF_CONV2D_TILES_F32(X)                                                                   \
  X(conv2d_fwd_tf32_128x128x16, tf32, false, async, 128, 128, 16, 64, 64, 4, 2)                  \
  X(conv2d_fwd_tf32_128x64x16, tf32, false, async, 128, 64, 16, 64, 32, 4, 3)                    \
  X(conv2d_fwd_tf32_64x64x32, tf32, false, async, 64, 64, 32, 32, 32, 4, 3)                      \
  X(conv2d_fwd_tf32_gather_128x64x16, tf32, true, async, 128, 64, 16, 64, 32, 4, 2)              \
  X(conv2d_fwd_f32_128x64x16, float32, false, async, 128, 64, 16, 64, 32, 4, 2)                  \
  X(conv2d_fwd_f32_64x64x16, float32, false, async, 64, 64, 16, 32, 32, 4, 4)                    \
  X(conv2d_fwd_f32_gather_128x64x16, float32, true, async, 128, 64, 16, 64, 32, 4, 2)            \
  X(conv2d_fwd_f32_sm75_128x64x16, float32, false, through_registers, 128, 64, 16, 64, 32, 2, 2) \
  X(conv2d_fwd_f32_sm75_gather_128x64x16, float32, true, through_registers, 128, 64, 16, 64, 32, 2, 2)

#define RF_CONV2D_TILES(X)                    \
  RF_CONV2D_TILES_F16_SM80(X, f16, float16)   \
  RF_CONV2D_TILES_F16_SM80(X, bf16, bfloat16) \
  RF_CONV2D_TILES_F16_SM75(X)                 \
  RF_CONV2D_TILES_F32(X)

namespace resnet_fused {

// The stem's kernel: 7x7, stride 2, padding 3, 3 channels of 16 bits. A block computes TILE x TILE pixels of
// CHANNELS channels, each of its warps two rows of pixels, from a patch of x and all their weights in shared memory.
struct StemTile {
  static constexpr int TILE = 16, CHANNELS = 64, WARPS = TILE / 2, THREADS = 32 * WARPS;
  static constexpr int FILTER = 7, STRIDE = 2, PAD = 3, INPUT_CHANNELS = 3;
  static constexpr int RUN = 24, BLOCKS_PER_ROW = RUN / 8;              // elements and mma blocks of 8 of a filter row
  static constexpr int MMA_STEPS = (FILTER * BLOCKS_PER_ROW + 1) / 2;   // of two blocks
  static constexpr int LEFT = 16;                                       // elements of x, whole 16 bytes, before the centre tap
  static constexpr int FIRST = LEFT - PAD * INPUT_CHANNELS - RUN_LEAD;  // where the first window begins in a patch row
  static constexpr int PATCH_ROWS = STRIDE * (TILE - 1) + FILTER;
  // Of a patch row; an even number, so that whole sectors of 32 bytes are read.
  static constexpr int PATCH_CHUNKS = (FIRST + STRIDE * INPUT_CHANNELS * (TILE - 1) + RUN + 15) / 16 * 2;
  static constexpr int PATCH_ROW_BYTES = PATCH_CHUNKS * 16, PATCH_BYTES = PATCH_ROWS * PATCH_ROW_BYTES;
  static constexpr int WEIGHT_CHUNKS = 23, WEIGHT_ROW_BYTES = WEIGHT_CHUNKS * 16;  // odd: ldmatrix meets no bank twice
  static constexpr int STRIP_BYTES = 16 * CHANNELS * 4;                            // of the epilogue, a warp
  static constexpr int OPERAND_BYTES = PATCH_BYTES + CHANNELS * WEIGHT_ROW_BYTES;
  static constexpr int SHARED_BYTES = OPERAND_BYTES > WARPS* STRIP_BYTES ? OPERAND_BYTES : WARPS * STRIP_BYTES;
  static_assert(FIRST % 2 == 0, "pairs of elements are aligned words");
  static_assert(WEIGHT_CHUNKS * 8 >= MMA_STEPS * 16 && WEIGHT_CHUNKS % 2 == 1);
};

}  // namespace resnet_fused
