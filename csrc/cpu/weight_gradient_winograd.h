// Gradient of the weights of a 3 x 3 convolution of stride 1 by Winograd: 36 products a tile instead of 144. Always in float32.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "weight_gradient_tile.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// The transforms of F(4 x 4, 3 x 3) turned round: with Y = A^T [U * V] A, dU = V * (A dY A^T) and dg = G^T dU G.
struct F4Gradient {
  // y = A x
  static RF_INLINE void output(const vec (&x)[F4::M], vec (&y)[F4::A]) {
    using F = F4;
    const vec even_p = mul(F::constant(F::NP), fma(F::constant(F::P2), x[2], x[0]));
    const vec odd_p = mul(F::constant(F::P * F::NP), fma(F::constant(F::P2), x[3], x[1]));
    const vec even_q = mul(F::constant(F::NQ), fma(F::constant(F::Q2), x[2], x[0]));
    const vec odd_q = mul(F::constant(F::Q * F::NQ), fma(F::constant(F::Q2), x[3], x[1]));
    y[0] = x[0];
    y[1] = add(even_p, odd_p);
    y[2] = sub(even_p, odd_p);
    y[3] = add(even_q, odd_q);
    y[4] = sub(even_q, odd_q);
    y[5] = x[3];
  }
  // y = G^T x
  static RF_INLINE void weight(const vec (&x)[F4::A], vec (&y)[3]) {
    using F = F4;
    const vec sum_p = add(x[1], x[2]), sum_q = add(x[3], x[4]);
    y[0] = add(x[0], add(sum_p, sum_q));
    y[1] = fma(F::constant(F::P), sub(x[1], x[2]), mul(F::constant(F::Q), sub(x[3], x[4])));
    y[2] = fma(F::constant(F::P2), sum_p, fma(F::constant(F::Q2), sum_q, x[5]));
  }
};

// A dY A^T of the tile whose first pixel is (top, left), for all channels. Pixels outside of the image have no gradient.
template <class T>
void transform_gradient_tile(const Strip<const T>& image, int64_t top, int64_t left, const T* zeros, float* e,
                             int64_t e_point_stride) {
  constexpr int M = F4::M, A = F4::A;
  const T* pixels[M][M];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < M; ++j) {
      pixels[i][j] = top + i < image.height && left + j < image.width ? image.pixel(top + i, left + j) : zeros;
    }
  }
  for (int64_t c = 0; c < image.channels; c += LANES) {
    const int64_t lanes = image.channels - c;
    vec half[A][M];
    RF_UNROLL(8)
    for (int j = 0; j < M; ++j) {
      vec column[M], transformed[A];
      RF_UNROLL(8)
      for (int i = 0; i < M; ++i) {
        column[i] = lanes >= LANES ? load(pixels[i][j] + c) : load(pixels[i][j] + c, static_cast<int>(lanes));
      }
      F4Gradient::output(column, transformed);
      RF_UNROLL(8)
      for (int i = 0; i < A; ++i) half[i][j] = transformed[i];
    }
    RF_UNROLL(8)
    for (int i = 0; i < A; ++i) {
      vec transformed[A];
      F4Gradient::output(half[i], transformed);
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) store(e + (i * A + j) * e_point_stride + c, transformed[j]);
    }
  }
}

// dg = G^T dU G of every pair of channels: dU [point][o][i] to dweight [o][tap][i].
inline void transform_weight_gradient(const WeightGradientParams& p, const float* du) {
  constexpr int A = F4::A, R = 3;
  const int64_t point = p.out_channels * p.in_channels;
  parallel_units(p.out_channels, [&](int64_t o, int64_t) {
    for (int64_t c = 0; c < p.in_channels; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, p.in_channels - c));
      const float* from = du + o * p.in_channels + c;
      float* to = p.dweight + o * R * R * p.in_channels + c;
      vec half[R][A];
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) {
        vec column[A], transformed[R];
        RF_UNROLL(8)
        for (int i = 0; i < A; ++i) column[i] = load(from + (i * A + j) * point, lanes);
        F4Gradient::weight(column, transformed);
        RF_UNROLL(8)
        for (int i = 0; i < R; ++i) half[i][j] = transformed[i];
      }
      RF_UNROLL(8)
      for (int i = 0; i < R; ++i) {
        vec transformed[R];
        F4Gradient::weight(half[i], transformed);
        RF_UNROLL(8)
        for (int j = 0; j < R; ++j) store(to + (i * R + j) * p.in_channels, transformed[j], lanes);
      }
    }
  });
}

// All threads transform a round of tiles, V to [point][vector of channels][tile][LANES] and A dY A^T to [point][tile][channel],
// then share out the points and output channels.
template <class T>
void weight_gradient_by_tiles(const WeightGradientParams& p) {
  constexpr int64_t POINTS = F4::A * F4::A, OUTS = 10, INS = 4;
  const int64_t down = (p.height + F4::M - 1) / F4::M, across = (p.width + F4::M - 1) / F4::M, tiles = p.batch * down * across;
  const int64_t in_row = panel_count(p.in_channels) * PANEL, out_row = vector_count(p.out_channels) * LANES;
  const int64_t point = p.out_channels * p.in_channels;
  // Elements of transformed tiles that are held at a time: a few times the sums, which each round reads and writes, and no more
  // than 12 MiB, within the last-level cache.
  const int64_t largest = std::clamp<int64_t>(4 * POINTS * point, int64_t{512} << 10, int64_t{3} << 20);
  const int64_t rounds = (tiles * POINTS * (in_row + out_row) + largest - 1) / largest;
  const int64_t most = (tiles + rounds - 1) / rounds;
  const int64_t v_stride = point_stride(most * in_row / LANES), e_stride = point_stride(most * out_row / LANES);
  const int64_t blocks = OutBlocks(p.out_channels).count, panels = panel_count(p.in_channels);
  const int64_t out_groups = (blocks + OUTS - 1) / OUTS, in_groups = (panels + INS - 1) / INS;
  Scratch scratch;
  float* v = scratch.take<float>(POINTS * v_stride);
  float* e = scratch.take<float>(POINTS * e_stride);
  float* du = scratch.take<float>(POINTS * point);
  T* zeros = scratch.take<T>(std::max(in_row, out_row));
  __builtin_memset(zeros, 0, static_cast<size_t>(std::max(in_row, out_row)) * sizeof(T));
  static constexpr auto product_tiles = outer_tiles<FloatProducts, false>(RowCounts{});
  const void* const zero_row[] = {zeros};
  const LinesAhead nothing_ahead{zero_row, 0, 0};
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = tiles * round / rounds, count = tiles * (round + 1) / rounds - begin;
    parallel_units(count, [&](int64_t i, int64_t) {
      const int64_t tile = begin + i, n = tile / (down * across);
      const int64_t top = tile / across % down * F4::M, left = tile % across * F4::M;
      const T* x = static_cast<const T*>(p.x) + n * p.height * p.width * p.in_channels;
      const T* dy = static_cast<const T*>(p.dy) + n * p.height * p.width * p.out_channels;
      transform_input_tile<F4, T>({x, 0, p.height, p.width, p.in_channels}, top - F4::PAD, left - F4::PAD, zeros, v + i * LANES,
                                  v_stride, most * LANES, zero());
      transform_gradient_tile<T>({dy, 0, p.height, p.width, p.out_channels}, top, left, zeros, e + i * out_row, e_stride);
    });
    parallel_units(POINTS * out_groups * in_groups, [&](int64_t unit, int64_t) {
      const int64_t in = unit % in_groups, out = unit / in_groups % out_groups, at = unit / in_groups / out_groups;
      const Part part{blocks * out / out_groups, blocks * (out + 1) / out_groups, panels * in / in_groups,
                      panels * (in + 1) / in_groups};
      const int64_t runs = (count + LONGEST_RUN - 1) / LONGEST_RUN;
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t first = count * r / runs;
        const int64_t steps = count * (r + 1) / runs - first;
        for (int64_t panel = part.first_in; panel < part.last_in; ++panel) {
          float* b = v + at * v_stride + (2 * panel * most + first) * LANES;
          for (int64_t block = part.first_out; block < part.last_out; ++block) {
            const int64_t o = OutBlocks(p.out_channels).begin(block);
            product_tiles[static_cast<size_t>(OutBlocks(p.out_channels).width(block) - 1)](
                {e + at * e_stride + first * out_row + o,
                 out_row,
                 b,
                 b + most * LANES,
                 LANES,
                 steps,
                 du + at * point + o * p.in_channels + panel * PANEL,
                 p.in_channels,
                 p.in_channels - panel * PANEL,
                 round > 0 || r > 0,
                 {},
                 nothing_ahead});
          }
        }
      }
    });
  }
  transform_weight_gradient(p, du);
}

inline void weight_gradient_winograd(const WeightGradientParams& p) {
  p.dtype == DType::bfloat16 ? weight_gradient_by_tiles<Bf16>(p) : weight_gradient_by_tiles<float>(p);
}

}  // namespace resnet_fused::cpu::RF_ISA
