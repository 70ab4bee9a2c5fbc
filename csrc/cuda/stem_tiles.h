// The kernels of the stem with its pool, listed once: stem.cu compiles them, the planner chooses among them. Plain C++.
#pragma once

#include <cstdint>

namespace resnet_fused {

// In which order x's elements lie in memory: rows of each channel, or the channels of each pixel.
enum class StemInput : int32_t { planar, interleaved };

// 7x7, stride 2, padding 3, 3 -> CHANNELS, then ReLU and a max-pool of 3x3, stride 2, padding 1. Each of the two warps of a
// block has half of the channels, with all of their weights in registers, and computes TILE pixels of two rows at once.
// Registers allow BLOCKS on a multiprocessor.
struct StemPoolTile {
  static constexpr int CHANNELS = 64, WARPS = 2, WARP_CHANNELS = CHANNELS / WARPS, THREADS = 32 * WARPS, BLOCKS = 6;
  static constexpr int INPUT_CHANNELS = 3, TILE = 16;
  // Rows of x by which the window of a row of the pool's result lies below that of the row before. They come together.
  static constexpr int GROUP_ROWS = 4, GROUP_LINES = GROUP_ROWS * INPUT_CHANNELS;
  // The products of a step of mma are with taps of two filter rows, 8 each: one of weight zero, in whose place x's pairs of
  // columns are aligned words, and 7. The 21 rows of all channels make 10 steps of two and one of one.
  static constexpr int PAIRED_STEPS = 10, COLUMNS = WARP_CHANNELS / 8;
  static constexpr int WEIGHT_WORDS = (2 * PAIRED_STEPS + 1) * COLUMNS;  // of a lane
  static constexpr int WEIGHT_BYTES = WARPS * WEIGHT_WORDS * 32 * 4;
  static constexpr int LEFT_BYTES = 16;                    // of zeros before a row of x
  static constexpr int KEPT_BYTES = WARP_CHANNELS * TILE;  // a warp's row of TILE / 2 maxima

  static constexpr int64_t row_pitch(int64_t tiles) { return tiles * TILE * 4 + 2 * LEFT_BYTES; }
};

// Groups of rows in shared memory, and bytes of each pixel of a group that waits there as it came.
template <StemInput INPUT>
constexpr int STEM_GROUPS = INPUT == StemInput::planar ? 4 : 3;
template <StemInput INPUT>
constexpr int STEM_STAGED_BYTES = INPUT == StemInput::planar ? 0 : StemPoolTile::GROUP_ROWS * StemPoolTile::INPUT_CHANNELS * 2;

}  // namespace resnet_fused

// X(name, element, input)
#define RF_STEM_KERNELS(X)                          \
  X(stem_fwd_f16_planar, float16, planar)           \
  X(stem_fwd_f16_interleaved, float16, interleaved) \
  X(stem_fwd_bf16_planar, bfloat16, planar)         \
  X(stem_fwd_bf16_interleaved, bfloat16, interleaved)
