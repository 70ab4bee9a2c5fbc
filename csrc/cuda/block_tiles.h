// The kernels of whole blocks, listed once: block_*.cu compile them, the planner chooses among them. Plain C++.
#pragma once

#include <cstdint>

namespace resnet_fused {

// Weights come to shared memory in chunks: whole fragments of all layers, in the order in which they are used.
constexpr int CHUNK_BYTES = 8192;
// 16 of k of 16 channels, as a warp's lanes hold them for mma.
constexpr int FRAGMENT_BYTES = 512;

// Rows of a layer's result lie in a ring. A pixel has an odd number of 16 bytes, so that the eight pixels an ldmatrix reads fall
// into different banks. Between rows are zeros, the halo of one's end and of the next one's beginning: whole 128 bytes more
// than a row's pixels, so that banks differ across the end of a row as well.
template <int WIDTH>
constexpr int RING_PIXEL_BYTES = WIDTH * 2 + 16;
template <int WIDTH>
constexpr int RING_HALO_BYTES = WIDTH * 2;

// IN -> WIDTH -> WIDTH -> OUT = 4 WIDTH channels of 16 bits, by 1x1, 3x3 and 1x1 layers of stride 1. PROJECTED: with a 1x1
// layer of stride 1 on the shortcut, else IN = OUT. RESIDENT: all weights stay in shared memory; else they pass through
// STAGES chunks of it again at each step. A warp computes WARP_PIXELS pixels, all channels of each.
template <int IN_, int WIDTH_, bool PROJECTED_, bool RESIDENT_, int WARPS_>
struct BottleneckTile {
  static constexpr int IN = IN_, WIDTH = WIDTH_, OUT = 4 * WIDTH_;
  static constexpr bool PROJECTED = PROJECTED_, RESIDENT = RESIDENT_;
  static constexpr int WARP_PIXELS = 32, WARPS = WARPS_, THREADS = 32 * WARPS;
  static constexpr int CHUNKS_1 = IN * WIDTH * 2 / CHUNK_BYTES, CHUNKS_2 = 9 * WIDTH * WIDTH * 2 / CHUNK_BYTES;
  static constexpr int CHUNKS_3 = OUT * (WIDTH + (PROJECTED ? IN : 0)) * 2 / CHUNK_BYTES;
  static constexpr int CHUNKS = CHUNKS_1 + CHUNKS_2 + CHUNKS_3;
  // Columns of mma of conv3 at once, of which a lane has 2 COLUMNS_3 neighbouring channels of the result; as registers suffice.
  static constexpr int COLUMNS_3 = PROJECTED ? 2 : 4;
  static constexpr int STAGES = RESIDENT ? CHUNKS : 3;
  static_assert(PROJECTED || IN == OUT);
  static_assert(WIDTH * 64 <= CHUNK_BYTES && 64 * (WIDTH + (PROJECTED ? IN : 0)) <= CHUNK_BYTES, "whole k of 32 in a chunk");
  static_assert(RING_HALO_BYTES<WIDTH> % 128 == 0 && RING_PIXEL_BYTES<WIDTH> / 16 % 2 == 1);
};

}  // namespace resnet_fused

// X(name, element, IN, WIDTH, PROJECTED, RESIDENT, WARPS, blocks a multiprocessor that registers allow). 7 warps have the pixels of four rows of a ResNet's first stage (56x56).
#define RF_BOTTLENECK_KERNELS(X, SUFFIX, ELEMENT)                                \
  X(bottleneck_fwd_##SUFFIX##_64, ELEMENT, 256, 64, false, false, 7, 2)          \
  X(bottleneck_fwd_##SUFFIX##_64_resident, ELEMENT, 256, 64, false, true, 14, 1) \
  X(bottleneck_fwd_##SUFFIX##_64_projected, ELEMENT, 64, 64, true, false, 7, 2)  \
  X(bottleneck_fwd_##SUFFIX##_64_projected_resident, ELEMENT, 64, 64, true, true, 14, 1)
