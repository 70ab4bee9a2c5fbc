// The stem of a ResNet as a whole: y = max_pool(relu(conv(x) + bias)), a 7x7 convolution of stride 2 on 3 channels and a
// pool of 3x3, stride 2. The convolution's result is rounded as the layer's would be, and never leaves the multiprocessor.
//
// A block of threads goes down a strip, a row of the pool's result a step, which is two new rows of the convolution; the one
// before them was computed in the step before, and its maxima along the row wait in shared memory. Along the row a warp goes
// tile by tile of 16 pixels. Weights stay in registers. mma's rows 0 to 7 are a tile's even pixels and 8 to 15 its odd ones,
// so that a lane has both pixels of a pair, and its left neighbour's lane the third of the pool's window.
#pragma once

#include "element.cuh"
#include "stem_rows.cuh"
#include "unroll.cuh"

namespace resnet_fused {

template <class T, StemInput INPUT>
class Stem {
  using Tile = StemPoolTile;
  static constexpr int COLUMNS = Tile::COLUMNS;
  static constexpr uint32_t ALL = 0xffffffffu;

  using Words = uint32_t[COLUMNS];  // two neighbouring channels each, 2 COLUMNS in a row

 public:
  __device__ __forceinline__ Stem(const StemParams& p, uint32_t shared)
      : p_(p),
        begin_(blockIdx.y * p.rows_per_strip),
        end_(min(begin_ + p.rows_per_strip, p.pooled_height)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_tap_(lane_ % 4 == 0 ? 0xffff0000u : ALL),
        rows_(p, shared, begin_, end_),
        kept_(shared + STEM_GROUPS<INPUT> * Tile::GROUP_LINES * p.row_pitch + STEM_STAGED_BYTES<INPUT> * p.width +
              (warp_ * p.tiles * 32 + lane_) * 16) {}

  __device__ __forceinline__ void run() {
    load_weight();
    rows_.start(begin_);
    if (begin_ > 0) {
      compute<false>(begin_ - 1);
    } else {
      for (int tile = 0; tile < p_.tiles; ++tile) ptx::store_shared_16<0>(kept_ + tile * Tile::KEPT_BYTES, uint4{});
    }
#pragma unroll 1
    for (int row = begin_; row < end_; ++row) {
      rows_.advance(row);
      compute<true>(row);
    }
  }

 private:
  __device__ __forceinline__ void load_weight() {
    const char* weight = static_cast<const char*>(p_.weight) + warp_ * (Tile::WEIGHT_BYTES / Tile::WARPS) + lane_ * 16;
    unroll<Tile::WEIGHT_WORDS / 4>([&](auto i) {
      const uint4 v = ptx::load_global_16(weight + i * 512, true);
      weight_[4 * i] = v.x, weight_[4 * i + 1] = v.y, weight_[4 * i + 2] = v.z, weight_[4 * i + 3] = v.w;
    });
  }

  // A row of the pool's result. Without STORED only the lower of its rows of the convolution, which the next result needs.
  template <bool STORED>
  __device__ __forceinline__ void compute(int row) {
    uint32_t from[3];  // of the lane's first pixel and word of each group
#pragma unroll
    for (int i = 0; i < 3; ++i) from[i] = rows_.group(row + i) + (lane_ / 4 * 2 + lane_ % 4) * 4 + Tile::LEFT_BYTES - 8;
    const int pixel = lane_ / 4;
    char* y = static_cast<char*>(p_.y) + warp_ * Tile::WARP_CHANNELS * 2 + lane_ % 4 * 16;
    y += ((int64_t(blockIdx.x) * p_.pooled_height + row) * p_.pooled_width + pixel) * (Tile::CHANNELS * 2);
    const bool second = 2 * row + 1 < p_.conv_height;  // whether the image has that row
    Words carried[2] = {};                             // the pixels left of a tile
#pragma unroll 1
    for (int tile = 0; tile < p_.tiles; ++tile) {
      float acc[2][COLUMNS][4];
      multiply<STORED>(acc, from);
      Words below;
      pooled_along(below, acc[1], tile, second, carried[1]);
      const uint32_t kept = kept_ + tile * Tile::KEPT_BYTES;
      if constexpr (STORED) {
        Words result;
        pooled_along(result, acc[0], tile, true, carried[0]);
        const float4 above = ptx::load_shared_16<0>(kept);
        const float words[4] = {above.x, above.y, above.z, above.w};
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          result[j] = ptx::max_word<T>(ptx::max_word<T>(result[j], below[j]), __float_as_uint(words[j]));
          result[j] = ptx::relu_word<T>(result[j]);
        }
        const bool valid = tile * (Tile::TILE / 2) + pixel < p_.pooled_width;
        ptx::store_global_16(y, {result[0], result[1], result[2], result[3]}, valid);
        y += Tile::TILE / 2 * Tile::CHANNELS * 2;
      }
      ptx::store_shared_16<0>(kept, {below[0], below[1], below[2], below[3]});
#pragma unroll
      for (int i = 0; i < 3; ++i) from[i] += Tile::TILE * 4;
    }
  }

  // Two rows of the convolution; the upper one only if UPPER. Of nine rows of x the upper one reads those from the first on,
  // the lower one those from the third on. What both read is loaded once, two rows for a step of mma.
  template <bool UPPER>
  __device__ __forceinline__ void multiply(float (&acc)[2][COLUMNS][4], const uint32_t (&from)[3]) const {
    // It is loaded as any memory, not by ld.global.nc: ptxas would do that once for all tiles, and find no registers for it.
    const float4* bias = reinterpret_cast<const float4*>(p_.bias + warp_ * Tile::WARP_CHANNELS + lane_ % 4 * 2 * COLUMNS);
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 2) {
      const float4 b = bias[j / 2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int odd = 0; odd < 4; odd += 2) {
          acc[r][j][odd] = b.x, acc[r][j][odd + 1] = b.y;
          acc[r][j + 1][odd] = b.z, acc[r][j + 1][odd + 1] = b.w;
        }
    }
    uint32_t seventh[2][4];  // filter rows, of two channels
    unroll<Tile::INPUT_CHANNELS>([&](auto channel) {
      unroll<4>([&](auto pair) {
        if constexpr (UPPER || pair > 0) {
          uint32_t a[4];
          load<channel, 2 * pair>(a[0], a[1], from);
          load<channel, 2 * pair + 1>(a[2], a[3], from);
          if constexpr (UPPER && pair < 3) step<3 * channel + pair>(acc[0], a);
          if constexpr (pair > 0) step<3 * channel + pair - 1>(acc[1], a);
          if constexpr (pair == 3) seventh[0][channel % 2 * 2] = a[0], seventh[0][channel % 2 * 2 + 1] = a[1];
        }
      });
      load<channel, 8>(seventh[1][channel % 2 * 2], seventh[1][channel % 2 * 2 + 1], from);
      unroll<2>([&](auto r) {
        if constexpr (channel > 0 && (UPPER || r == 1)) step<8 + channel>(acc[r], seventh[r]);
      });
    });
  }

  // Words of both pixels of a lane's pair, of a row of x, counted from the first that the upper row of the convolution reads.
  template <int CHANNEL, int ROW>
  __device__ __forceinline__ void load(uint32_t& even, uint32_t& odd, const uint32_t (&from)[3]) const {
    constexpr int GROUP = ROW / Tile::GROUP_ROWS, LINE = CHANNEL * Tile::GROUP_ROWS + ROW % Tile::GROUP_ROWS;
    const uint32_t address = from[GROUP] + LINE * p_.row_pitch;
    // What lies before the window must not contribute: zero times infinity is no zero.
    even = ptx::load_shared_4<0>(address) & first_tap_, odd = ptx::load_shared_4<4>(address) & first_tap_;
  }

  // acc += the product of two rows' words with all columns; of one in the last step.
  template <int STEP>
  __device__ __forceinline__ void step(float (&acc)[COLUMNS][4], const uint32_t (&a)[4]) const {
    constexpr int FIRST = STEP * COLUMNS * 2;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if constexpr (STEP < Tile::PAIRED_STEPS) {
        ptx::mma_16x8<T>(acc[j], a, weight_[FIRST + 2 * j], weight_[FIRST + 2 * j + 1]);
      } else {
        ptx::mma_16x8_half<T>(acc[j], a[0], a[1], weight_[FIRST + j]);
      }
    }
  }

  // The maxima of the pool's windows along a row of the convolution. ReLU follows, so zeros stand where there is no pixel.
  // carried: what lies left of this tile, and then left of the next one.
  __device__ __forceinline__ void pooled_along(Words& result, const float (&acc)[COLUMNS][4], int tile, bool exists,
                                               Words& carried) const {
    // Masks: of conditions nvcc makes branches, with a shuffle in each, in which all lanes must take part together.
    const int left = tile * Tile::TILE + lane_ / 4 * 2 - (exists ? p_.conv_width : 0);
    const uint32_t masks[2] = {uint32_t(left >> 31), uint32_t((left + 1) >> 31)};  // ones before the end of the row
    const uint32_t leftmost = uint32_t((lane_ - 4) >> 31);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const uint32_t even = to_word<T>(acc[j][0], acc[j][1]) & masks[0];
      const uint32_t odd = to_word<T>(acc[j][2], acc[j][3]) & masks[1];
      const uint32_t neighbour = __shfl_sync(ALL, odd, lane_ + 28);  // of the lane before, modulo 32
      result[j] = ptx::max_word<T>(ptx::max_word<T>(even, odd), ptx::select_bits(leftmost, carried[j], neighbour));
      carried[j] = neighbour;
    }
  }

  const StemParams& p_;
  const int begin_, end_, warp_, lane_;
  const uint32_t first_tap_;
  const StemRows<INPUT> rows_;
  const uint32_t kept_;
  uint32_t weight_[Tile::WEIGHT_WORDS];
};

}  // namespace resnet_fused
