// What the kernels of whole blocks are made of. A warp has 32 pixels, as two tiles of 16, and all channels of each; fragments
// are those of mma m16n8k16 (PTX ISA 9.7.15.5). A lane holds parts of four pixels, eight apart from lane / 4 on.
#pragma once

#include "block_params.h"
#include "block_tiles.h"
#include "element.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// 16 of k of a warp's pixels, by tile of pixels.
using PixelFragments = uint32_t[2][4];

// acc += the product of 16 of k with COLUMNS x 8 channels. b: the lane's address of COLUMNS / 2 fragments, less OFFSET.
template <class T, int OFFSET, int COLUMNS>
__device__ __forceinline__ void multiply(float (&acc)[2][COLUMNS][4], const PixelFragments& a, uint32_t b) {
  unroll<COLUMNS / 2>([&](auto pair) {
    uint32_t fragment[4];
    ptx::ldmatrix_x4<OFFSET + pair * FRAGMENT_BYTES>(fragment, b);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::mma_16x8<T>(acc[i][2 * pair + j], a[i], fragment[2 * j], fragment[2 * j + 1]);
  });
}

// acc = the bias of COLUMNS x 8 channels, which is packed as lanes load it: (COLUMNS / 2, 4 lanes, 4). It is loaded as any
// memory, not by ld.global.nc: ptxas would do that once for all steps, and find no registers to keep it.
template <int COLUMNS>
__device__ __forceinline__ void start(float (&acc)[2][COLUMNS][4], const float* bias, int lane) {
#pragma unroll
  for (int j = 0; j < COLUMNS; j += 2) {
    const float4 b = *reinterpret_cast<const float4*>(bias + j * 8 + lane % 4 * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int upper = 0; upper < 4; upper += 2) {
        acc[i][j][upper] = b.x, acc[i][j][upper + 1] = b.y;
        acc[i][j + 1][upper] = b.z, acc[i][j + 1][upper + 1] = b.w;
      }
  }
}

// Neighbouring channels of each of a lane's four pixels, two a word.
template <int WORDS>
struct PixelWords {
  uint32_t words[4][WORDS];

  // from: the lane's channels of its first pixel; stride: bytes between pixels. LAST: nobody reads them soon again.
  template <bool LAST = false>
  __device__ __forceinline__ void load(const char* from, int stride, const bool (&valid)[4]) {
    static_assert(WORDS == 4);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const char* pixel = from + r * 8 * stride;
      const uint4 v = LAST ? ptx::load_global_16_last(pixel, valid[r]) : ptx::load_global_16(pixel, valid[r]);
      words[r][0] = v.x, words[r][1] = v.y, words[r][2] = v.z, words[r][3] = v.w;
    }
  }

  __device__ __forceinline__ void store(char* to, int stride, const bool (&valid)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (WORDS == 4) {
        ptx::store_global_16_last(to + r * 8 * stride, {words[r][0], words[r][1], words[r][2], words[r][3]}, valid[r]);
      } else {
        ptx::store_global_8_last(to + r * 8 * stride, {words[r][0], words[r][1]}, valid[r]);
      }
    }
  }
};

// Accumulators rounded to T, each column's two channels of a pixel as a word.
template <class T, int COLUMNS>
__device__ __forceinline__ PixelWords<COLUMNS> rounded(const float (&acc)[2][COLUMNS][4]) {
  PixelWords<COLUMNS> result;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) result.words[r][j] = to_word<T>(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]);
  return result;
}

// relu(a + b), rounded as PyTorch's sum of two tensors is.
template <class T, int WORDS>
__device__ __forceinline__ PixelWords<WORDS> add_relu(const PixelWords<WORDS>& a, const PixelWords<WORDS>& b) {
  PixelWords<WORDS> result;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int j = 0; j < WORDS; ++j) result.words[r][j] = ptx::relu_word<T>(add_words<T>(a.words[r][j], b.words[r][j]));
  return result;
}

// A layer's result after ReLU as the next one's fragments: mma has both in the same lanes.
template <class T, int COLUMNS>
__device__ __forceinline__ void relu_fragments(const float (&acc)[2][COLUMNS][4], PixelFragments (&a)[COLUMNS / 2]) {
  const PixelWords<COLUMNS> result = rounded<T>(acc);
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) a[j / 2][r / 2][j % 2 * 2 + r % 2] = ptx::relu_word<T>(result.words[r][j]);
}

// What was loaded of 32 channels as fragments: k runs over the channels in the order (2 steps, 2 halves of a step, 4 lanes, 2),
// which the packed weights follow.
__device__ __forceinline__ void to_fragments(const PixelWords<4>& loaded, PixelFragments (&a)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int part = 0; part < 4; ++part) a[step][i][part] = loaded.words[2 * i + part % 2][2 * step + part / 2];
}

// Rows of WIDTH channels in shared memory, with zeros where the 3x3 window leaves the image on the left and right. A row's
// number is that of its slot in the ring.
template <int WIDTH, int THREADS>
class RowRing {
 public:
  // address: of the ring's shared memory, as block_plan.cpp counts it.
  __device__ __forceinline__ RowRing(const BlockParams& p, uint32_t address) : p_(p), address_(address) {
    constexpr int VECTORS = RING_PIXEL_BYTES<WIDTH> / 16;
    for (int i = threadIdx.x; i < (p.ring_rows + 1) * VECTORS; i += THREADS)
      ptx::store_shared_16<0>(address + i / VECTORS * p.ring_pitch + i % VECTORS * 16, uint4{});
    // Where pixels lie behind their first row: a table costs fewer registers than what a division leaves in them.
    for (int i = threadIdx.x; i < p.rows * p.width; i += THREADS)
      ptx::store_shared_4<0>(table(i), i / p.width * p.ring_pitch + i % p.width * RING_PIXEL_BYTES<WIDTH>);
  }

  // The row so many rows after another, fewer than there are.
  __device__ __forceinline__ int after(int row, int rows) const {
    row += rows;
    return row >= p_.ring_rows ? row - p_.ring_rows : row;
  }

  // Address of the pixel of that number, counted from the beginning of a row on. Its neighbours lie RING_PIXEL_BYTES away.
  // Needs a barrier since the ring was made.
  __device__ __forceinline__ uint32_t address(int row, int pixel) const {
    const uint32_t bytes = p_.ring_rows * p_.ring_pitch;
    const uint32_t offset = row * p_.ring_pitch + ptx::load_shared_4<0>(table(pixel));
    return address_ + RING_PIXEL_BYTES<WIDTH> + (offset >= bytes ? offset - bytes : offset);
  }

 private:
  __device__ __forceinline__ uint32_t table(int pixel) const {
    return address_ + p_.ring_rows * p_.ring_pitch + RING_PIXEL_BYTES<WIDTH> + pixel * 4;
  }

  const BlockParams& p_;
  const uint32_t address_;
};

}  // namespace resnet_fused
