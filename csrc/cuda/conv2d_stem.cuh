// The first convolution of a ResNet: 7x7, stride 2, padding 3, 3 channels, with the fused epilogue. Direct convolution
// from a patch of x in shared memory: x is read once, with no im2col. Each filter row of 21 elements is three mma
// blocks of 8 along k: one zero in front, which makes pairs of elements aligned words of the patch, 21 weights, two
// zeros.
#pragma once

#include "conv2d_params.h"
#include "conv2d_tiles.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

template <class T>
__device__ __forceinline__ void load_stem_patch(const Conv2dParams& p, uint32_t patch, int image, int out_h, int out_w) {
  using Tile = StemTile;
  const int first_h = out_h * Tile::STRIDE - Tile::PAD;
  const int first_element = out_w * Tile::STRIDE * Tile::INPUT_CHANNELS - Tile::LEFT;  // in its row; whole 16 bytes
  const int elements = p.width * Tile::INPUT_CHANNELS;                                 // whole 16 bytes
  const char* x = static_cast<const char*>(p.x) + image * p.image_stride;
  for (int i = threadIdx.x; i < Tile::PATCH_ROWS * Tile::PATCH_CHUNKS; i += Tile::THREADS) {
    const int row = i / Tile::PATCH_CHUNKS, chunk = i % Tile::PATCH_CHUNKS;
    const int h = first_h + row, element = first_element + chunk * 8;
    const bool valid = uint32_t(h) < uint32_t(p.height) && uint32_t(element) < uint32_t(elements);
    ptx::cp_async_16<0>(patch + i * 16, x + h * p.row_stride + element * int(sizeof(T)), valid);
  }
}

template <class T>
__device__ __forceinline__ void load_stem_weight(const Conv2dParams& p, uint32_t weight, int first_channel) {
  using Tile = StemTile;
  constexpr int USED = Tile::FILTER * Tile::BLOCKS_PER_ROW;
  for (int i = threadIdx.x; i < Tile::CHANNELS * Tile::WEIGHT_CHUNKS; i += Tile::THREADS) {
    const int channel = i / Tile::WEIGHT_CHUNKS, chunk = i % Tile::WEIGHT_CHUNKS;
    const char* from = static_cast<const char*>(p.weight) + (first_channel + channel) * p.weight_stride + chunk * 16;
    ptx::cp_async_16<0>(weight + i * 16, from, chunk < USED && first_channel + channel < p.out_channels);
  }
}

template <class T>
__device__ __forceinline__ void conv2d_stem_fwd(const Conv2dParams& p, unsigned char* shared) {
  using Tile = StemTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles_w = (p.row.divisor + Tile::TILE - 1) / Tile::TILE;
  const int tile_h = blockIdx.x / tiles_w, out_h = tile_h * Tile::TILE, out_w = (blockIdx.x - tile_h * tiles_w) * Tile::TILE;
  const int image = blockIdx.y, first_channel = blockIdx.z * Tile::CHANNELS;
  const uint32_t patch = ptx::shared_address(shared), weight = patch + Tile::PATCH_BYTES;

  load_stem_patch<T>(p, patch, image, out_h, out_w);
  load_stem_weight<T>(p, weight, first_channel);
  ptx::cp_async_commit();
  static_assert(Epilogue<T, Tile::CHANNELS>::STRIP_BYTES == Tile::STRIP_BYTES);
  Epilogue<T, Tile::CHANNELS> epilogue(p, first_channel, lane, patch + warp * Tile::STRIP_BYTES);

  float acc[2][8][4] = {};
  // Of a pair of elements before or after the window, the part that x must not contribute: 0 times infinity is no
  // zero.
  const uint32_t first_mask = lane % 4 == 0 ? 0xffff0000u : ~0u, last_mask = lane % 4 == 3 ? 0 : ~0u;
  const uint32_t a = patch + warp * 2 * Tile::STRIDE * Tile::PATCH_ROW_BYTES + Tile::FIRST * 2 +
                     lane / 4 * (Tile::STRIDE * Tile::INPUT_CHANNELS * 2) + lane % 4 * 4;
  const uint32_t b = weight + (lane % 8 + lane / 16 * 8) * Tile::WEIGHT_ROW_BYTES + lane / 8 % 2 * 16;
  ptx::cp_async_wait<0>();
  __syncthreads();

  unroll<Tile::MMA_STEPS>([&](auto step) {
    uint32_t fragments_a[2][4] = {}, fragments_b[4][4];
    unroll<4>([&](auto j) { ptx::ldmatrix_x4<step * 32 + j * 16 * Tile::WEIGHT_ROW_BYTES>(fragments_b[j], b); });
    unroll<2>([&](auto half) {
      constexpr int BLOCK = step * 2 + half, ROW = BLOCK / Tile::BLOCKS_PER_ROW, IN_ROW = BLOCK % Tile::BLOCKS_PER_ROW;
      if constexpr (ROW < Tile::FILTER) {
        constexpr int OFFSET = ROW * Tile::PATCH_ROW_BYTES + IN_ROW * 16;
        unroll<2>([&](auto i) {
          constexpr int PIXELS = OFFSET + i * Tile::STRIDE * Tile::PATCH_ROW_BYTES;
          uint32_t low = ptx::load_shared_4<PIXELS>(a);
          uint32_t high = ptx::load_shared_4<PIXELS + 8 * Tile::STRIDE * Tile::INPUT_CHANNELS * 2>(a);
          if constexpr (IN_ROW == 0) low &= first_mask, high &= first_mask;
          if constexpr (IN_ROW == Tile::BLOCKS_PER_ROW - 1) low &= last_mask, high &= last_mask;
          fragments_a[i][half * 2] = low, fragments_a[i][half * 2 + 1] = high;
        });
      }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        ptx::mma_16x8<T>(acc[i][j], fragments_a[i], fragments_b[j / 2][j % 2 * 2], fragments_b[j / 2][j % 2 * 2 + 1]);
  });

  __syncthreads();
  epilogue.begin();
  const int out_height = p.image.divisor / p.row.divisor, out_width = p.row.divisor;
  epilogue.store(acc, [&](int i) {
    const int h = out_h + warp * 2 + i;
    return StripRows{(image * out_height + h) * out_width + out_w, h < out_height ? out_width - out_w : 0};
  });
}

}  // namespace resnet_fused
