// Winograd's products for so few tiles that their sums stay in registers: a vector of weights is transformed in registers and
// used at once. Transformed in memory, where each is read but once or twice, weights take as long to make as to multiply.
#pragma once

#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// 6 points x 4 tiles of sums, 3 lines of weights, a value and constants in 32 registers; with 16 registers half as many.
constexpr int FEW_TILES = LANES == 16 ? 4 : 2;
// Input channels whose taps (9 vectors each) and V stay in L1 while the rows of points pass over them.
constexpr int64_t FEW_CHANNELS = 32;

template <class T>
struct FewTilesProduct {
  const T* taps;  // [channel][9], PANEL apart: one vector of output channels
  const T* next;  // the taps used after these, which are fetched meanwhile
  int64_t channels;
  const float* v;    // [point][channel block][FEW_TILES][LANES]
  int64_t v_stride;  // between points
  float* m;          // [point][tile][LANES]
  int64_t m_stride;
  bool accumulate;  // add to m
};

// The tiles with products at a point, known when compiling: all, or for SHORT those of an image of two by two tiles whose
// second row and column are short.
template <class F, bool SHORT>
constexpr bool has_product(int row, int column, int tile) {
  if (!SHORT) return true;
  return (row < F::A - 1 || tile == 1 || tile == 2) && (column < F::A - 1 || tile < 2);
}

// Row ROW of points: m[ROW][j][tile] (+)= sum over channels of v[ROW][j][tile] * (G g G^T)[ROW][j].
template <class F, int ROW, bool SHORT, class T>
void few_tiles_row(const FewTilesProduct<T>& p) {
  constexpr int A = F::A;
  vec acc[A][FEW_TILES];
  RF_UNROLL(8)
  for (int j = 0; j < A; ++j) {
    RF_UNROLL(4)
    for (int t = 0; t < FEW_TILES; ++t) acc[j][t] = zero();
  }
  const float* points[A];
  RF_UNROLL(8)
  for (int j = 0; j < A; ++j) points[j] = p.v + (ROW * A + j) * p.v_stride;
  const T* taps = p.taps;
  const T* next = p.next + ROW * PANEL;
  for (int64_t c = 0; c < p.channels; ++c, taps += CHANNEL_TAPS, next += CHANNEL_TAPS) {
    prefetch_l1(next);
    if (ROW < 9 - A) prefetch_l1(next + A * PANEL);
    vec lines[3], u[A];
    RF_UNROLL(3)
    for (int j = 0; j < 3; ++j) {
      const vec column[3] = {load(taps + j * PANEL), load(taps + (3 + j) * PANEL), load(taps + (6 + j) * PANEL)};
      vec transformed[A];
      F::weight(column, transformed);
      lines[j] = transformed[ROW];
    }
    F::weight(lines, u);
    const int64_t at = c / LANES * FEW_TILES * LANES + c % LANES;
    RF_UNROLL(8)
    for (int j = 0; j < A; ++j) {
      RF_UNROLL(4)
      for (int t = 0; t < FEW_TILES; ++t) {
        if (has_product<F, SHORT>(ROW, j, t)) acc[j][t] = fma(splat(points[j][at + t * LANES]), u[j], acc[j][t]);
      }
    }
  }
  float* m = p.m + ROW * A * p.m_stride;
  const int64_t m_stride = p.m_stride;
  const auto each = [&](auto&& put) {
    RF_UNROLL(8)
    for (int j = 0; j < A; ++j) {
      RF_UNROLL(4)
      for (int t = 0; t < FEW_TILES; ++t) {
        if (has_product<F, SHORT>(ROW, j, t)) put(m + j * m_stride + t * LANES, acc[j][t]);
      }
    }
  };
  if (p.accumulate) {
    each([](float* to, vec sum) { store(to, add(sum, load(to))); });
  } else {
    each([](float* to, vec sum) { store(to, sum); });
  }
}

template <class F, bool SHORT, class T, int... ROW>
void few_tiles_rows(const FewTilesProduct<T>& p, std::integer_sequence<int, ROW...>) {
  (few_tiles_row<F, ROW, SHORT>(p), ...);
}

template <class F, class T>
void multiply_few_tiles(const FewTilesProduct<T>& p, bool two_by_two_short) {
  constexpr auto rows = std::make_integer_sequence<int, F::A>{};
  if constexpr (FEW_TILES == 4) {
    if (two_by_two_short) return few_tiles_rows<F, true>(p, rows);
  }
  few_tiles_rows<F, false>(p, rows);
}

}  // namespace resnet_fused::cpu::RF_ISA
