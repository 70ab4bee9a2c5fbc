// The register tile: up to MAX_ROWS output pixels x PANEL output channels, held in registers over the whole sum.
//
// Activations and weights are 32-bit units: a float32 channel, or a pair of bfloat16 channels (simd.h); "channel" below means
// such a unit. For each input channel the tile loads two weight vectors and, for each of its pixels, broadcasts one activation
// into two multiply-adds. Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "nonlinearity.h"

namespace resnet_fused::cpu::RF_ISA {

// Weights are read once per tile from L2 or beyond: fetched into L1 this many elements ahead.
constexpr int WEIGHT_PREFETCH = 2048;

// Stands for a row stride that is known only at run time.
constexpr int RUNTIME_STRIDE = 0;

template <int ROWS>
struct Accumulators {
  vec low[ROWS], high[ROWS];
};

// What a tile adds up: products of transformed activations, always float32, or those of activations as they are.
struct FloatProducts {
  static RF_INLINE vec add(vec a, vec b, vec acc) { return fma(a, b, acc); }
};
struct UnitProducts {
  static RF_INLINE vec add(vec a, vec b, vec acc) { return multiply_add(a, b, acc); }
};

// One input channel: acc[r] += rows[r] * (b[0], b[1]).
template <class Products, int ROWS, int STRIDE, int LINES>
RF_INLINE void multiply_channel(Accumulators<ROWS>& acc, const float* const (&base)[(MAX_ROWS + 2) / 3], int64_t stride,
                                int64_t k, const float* b) {
  const vec b_low = load(b), b_high = load(b + LANES);
  prefetch_l1(b + WEIGHT_PREFETCH);
  if (PANEL * sizeof(float) > 64) prefetch_l1(b + WEIGHT_PREFETCH + LANES);
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    constexpr int LINE = ROWS / LINES;
    const float* a = STRIDE != RUNTIME_STRIDE ? base[r / LINE] + (r % LINE) * STRIDE : base[r / 3] + (r % 3) * stride;
    const vec x = splat(a[k]);
    acc.low[r] = Products::add(x, b_low, acc.low[r]);
    acc.high[r] = Products::add(x, b_high, acc.high[r]);
  }
}

// acc[r] += sum over `channels` of a[r][k] * b[k][0..PANEL). Channels come in blocks of LANES, `block_stride` apart; rows are
// `row_stride` apart, or STRIDE in each of LINES lines that are `row_stride` apart. The activations `ahead` elements further on
// are prefetched (0: none); `between()` is called once a block. Returns the weights after the last ones read.
template <class Products, int ROWS, int STRIDE, int LINES, class Between>
RF_INLINE const float* multiply(Accumulators<ROWS>& acc, const float* a, int64_t row_stride, int64_t block_stride,
                                int64_t channels, const float* b, int64_t ahead, Between&& between) {
  const float* base[(MAX_ROWS + 2) / 3];
  RF_UNROLL(8)
  for (int i = 0; i < (MAX_ROWS + 2) / 3; ++i) base[i] = a + (STRIDE != RUNTIME_STRIDE ? 1 : 3) * i * row_stride;
  for (; channels >= LANES; channels -= LANES) {
    if (ahead != 0) {
      RF_UNROLL(16)
      for (int r = 0; r < ROWS; ++r) prefetch_l1(base[r / 3] + (r % 3) * row_stride + ahead);
    }
    between();
    RF_UNROLL(4)
    for (int k = 0; k < LANES; ++k) multiply_channel<Products, ROWS, STRIDE, LINES>(acc, base, row_stride, k, b + k * PANEL);
    b += LANES * PANEL;
    RF_UNROLL(8)
    for (int i = 0; i < (MAX_ROWS + 2) / 3; ++i) base[i] += block_stride;
  }
  for (int64_t k = 0; k < channels; ++k, b += PANEL) {
    multiply_channel<Products, ROWS, STRIDE, LINES>(acc, base, row_stride, k, b);
  }
  return b;
}

// ---- Winograd: a plain product of blocked matrices ----------------------------------------------------------------------

struct ProductTile {
  const float* a;  // [channel block][row][LANES]
  int64_t a_block_stride;
  const float* b;  // [channel][PANEL]
  int64_t channels;
  float* c;  // [2][row][LANES]
  int64_t c_vector_stride;
  bool accumulate;  // add to c
};

template <int ROWS>
void product_tile(const ProductTile& t, int64_t first_row) {
  float* c = t.c + first_row * LANES;
  Accumulators<ROWS> acc;
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) acc.low[r] = acc.high[r] = zero();
  multiply<FloatProducts, ROWS, LANES, 1>(acc, t.a + first_row * LANES, LANES, t.a_block_stride, t.channels, t.b, 0, [] {});
  if (t.accumulate) {
    // After the sum, not before it: sums of sums round less than one long sum.
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      acc.low[r] = add(acc.low[r], load(c + r * LANES));
      acc.high[r] = add(acc.high[r], load(c + t.c_vector_stride + r * LANES));
    }
  }
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * LANES, acc.low[r]);
    store(c + t.c_vector_stride + r * LANES, acc.high[r]);
  }
}

// ---- Direct convolution: a sum over taps, with the epilogue -------------------------------------------------------------

// Products summed in one go; such sums are then added up. One sum of 2048 products has three times the error, and putting sums
// down this often takes no time that could be measured.
constexpr int64_t LONGEST_DIRECT_SUM = 256;

// Sums of a tile that were put down, to begin others.
template <int ROWS>
class PartialSums {
 public:
  // Takes the accumulators' sums, and begins new ones.
  RF_INLINE void put(Accumulators<ROWS>& acc) {
    if (any_) add_to(acc);
    any_ = true;
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      store(low_[r], acc.low[r]);
      store(high_[r], acc.high[r]);
      acc.low[r] = acc.high[r] = zero();
    }
  }
  RF_INLINE void add_to(Accumulators<ROWS>& acc) const {
    if (!any_) return;
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      acc.low[r] = add(acc.low[r], load(low_[r]));
      acc.high[r] = add(acc.high[r], load(high_[r]));
    }
  }

 private:
  bool any_ = false;
  alignas(64) float low_[ROWS][LANES], high_[ROWS][LANES];
};

// One tap is one kernel position (or one kernel row, for the stem): where its activations for row 0 begin.
template <class Out>
struct ConvTile {
  const float* const* taps;
  int64_t tap_count;
  int64_t row_stride;    // between neighbouring output pixels; between the lines, where a tile has two
  int64_t block_stride;  // between blocks of LANES channels
  int64_t channels;      // summed per tap
  int64_t ahead;         // distance to the activations that are used next, for prefetching; 0: they are in the cache
  const float* b;        // [tap][channel][PANEL]
  const float* bias;     // [PANEL]
  const Out* residual;   // row 0, or null
  Out* y;
  int64_t pixel_stride;  // between rows of y and of residual
  int64_t out_lanes;     // channels of this panel that exist
  Nonlinearity nonlinearity;
};

template <class Out>
RF_INLINE void finish(vec acc, const Out* residual, Out* y, vec floor) {
  if (residual != nullptr) acc = add(stored<Out>(acc), load(residual));
  store(y, max_keeping_nan(floor, acc));
}

template <class Out>
RF_INLINE void finish(vec acc, const Out* residual, Out* y, vec floor, int64_t lanes) {
  if (lanes <= 0) return;
  const int n = static_cast<int>(lanes < LANES ? lanes : LANES);
  if (residual != nullptr) acc = add(stored<Out>(acc), load(residual, n));
  store(y, max_keeping_nan(floor, acc), n);
}

// The rows of y and of the residual that the tile below will need, fetched a few for each block of channels, which was measured to
// be faster than all at once: the tile's own operands needn't wait for them.
template <int ROWS, class Out>
class RowsBelow {
 public:
  RowsBelow(const ConvTile<Out>& t, const Out* residual, const Out* y)
      : y_(y + ROWS * t.pixel_stride),
        // A result that is written over its residual needs one of them.
        residual_(residual == nullptr || residual == y ? nullptr : residual + ROWS * t.pixel_stride),
        stride_(t.pixel_stride) {
    const int64_t blocks = std::max<int64_t>(t.tap_count * t.channels / LANES, 1);
    share_ = (ROWS + blocks - 1) / blocks;
  }

  RF_INLINE void advance() {
    for (const int64_t rest = std::max<int64_t>(left_ - share_, 0); left_ > rest; --left_) {
      fetch<true>(y_);
      y_ += stride_;
      if (residual_ == nullptr) continue;
      fetch<false>(residual_);
      residual_ += stride_;
    }
  }

 private:
  // Inlined by force: GCC takes a function that only prefetches for one without effect, and leaves its calls out.
  template <bool WRITE>
  static RF_INLINE void fetch(const Out* p) {
    WRITE ? prefetch_for_write(p) : prefetch_l1(p);
    if (PANEL * sizeof(Out) > 64) WRITE ? prefetch_for_write(p + LANES) : prefetch_l1(p + LANES);
  }

  const Out *y_, *residual_;
  const int64_t stride_;
  int64_t share_, left_ = ROWS;
};

// The epilogue of a whole panel.
template <int ROWS, bool RESIDUAL, class Out>
RF_INLINE void finish_rows(const Accumulators<ROWS>& acc, const Out* residual, Out* y, int64_t pixel_stride, vec floor) {
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r, y += pixel_stride) {
    finish(acc.low[r], RESIDUAL ? residual : nullptr, y, floor);
    finish(acc.high[r], RESIDUAL ? residual + LANES : nullptr, y + LANES, floor);
    if (RESIDUAL) residual += pixel_stride;
  }
}

template <int ROWS, int STRIDE, int LINES, class Out>
void conv_tile(const ConvTile<Out>& t, int64_t first_row) {
  Out* y = t.y + first_row * t.pixel_stride;
  const Out* residual = t.residual == nullptr ? nullptr : t.residual + first_row * t.pixel_stride;

  Accumulators<ROWS> acc;
  const vec bias_low = load(t.bias), bias_high = load(t.bias + LANES);
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    acc.low[r] = bias_low;
    acc.high[r] = bias_high;
  }
  const float* b = t.b;
  const int64_t offset = first_row * (STRIDE != RUNTIME_STRIDE ? STRIDE : t.row_stride);
  RowsBelow<ROWS, Out> below(t, residual, y);
  PartialSums<ROWS> sums;
  int64_t room = LONGEST_DIRECT_SUM;
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const float* a = t.taps[tap] + offset;
    for (int64_t rest = t.channels; rest > 0;) {
      if (room < std::min<int64_t>(rest, LANES)) {
        sums.put(acc);
        room = LONGEST_DIRECT_SUM;
      }
      const int64_t run = rest <= room ? rest : room / LANES * LANES;
      b = multiply<UnitProducts, ROWS, STRIDE, LINES>(acc, a, t.row_stride, t.block_stride, run, b, t.ahead,
                                                      [&] { below.advance(); });
      a += run / LANES * t.block_stride;
      rest -= run, room -= run;
    }
  }
  sums.add_to(acc);

  const vec floor = floor_of(t.nonlinearity);
  if (t.out_lanes >= PANEL) {
    residual == nullptr ? finish_rows<ROWS, false>(acc, residual, y, t.pixel_stride, floor)
                        : finish_rows<ROWS, true>(acc, residual, y, t.pixel_stride, floor);
  } else {
    Out* row = y;
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r, row += t.pixel_stride) {
      finish(acc.low[r], residual, row, floor, t.out_lanes);
      finish(acc.high[r], residual == nullptr ? nullptr : residual + LANES, row + LANES, floor, t.out_lanes - LANES);
      if (residual != nullptr) residual += t.pixel_stride;
    }
  }
  apply_nonlinearity(t.nonlinearity, y, ROWS, t.pixel_stride, std::min<int64_t>(t.out_lanes, PANEL));
}

// ---- Splitting a run of rows into tiles ---------------------------------------------------------------------------------

// Tiles of one run share their arguments and differ in the first row: a copy of the arguments for each tile would have to wait
// until the results that were stored before it have reached the cache.
template <class Args>
using TileFunction = void (*)(const Args&, int64_t first_row);

template <int... N>
constexpr std::array<TileFunction<ProductTile>, sizeof...(N)> product_tiles(std::integer_sequence<int, N...>) {
  return {&product_tile<N + 1>...};
}

template <int STRIDE, class Out, int... N>
constexpr std::array<TileFunction<ConvTile<Out>>, sizeof...(N)> conv_tiles(std::integer_sequence<int, N...>) {
  return {&conv_tile<N + 1, STRIDE, 1, Out>...};
}

template <int STRIDE, class Out, int... N>
constexpr std::array<TileFunction<ConvTile<Out>>, sizeof...(N)> two_line_tiles(std::integer_sequence<int, N...>) {
  return {&conv_tile<2 * (N + 1), STRIDE, 2, Out>...};
}

using RowCounts = std::make_integer_sequence<int, MAX_ROWS>;

// Calls visit(first row, rows) for tiles of nearly equal height, so that no tile is left with a row or two.
template <class Visit>
RF_INLINE void for_each_row_tile(int64_t rows, Visit&& visit) {
  const int64_t count = (rows + MAX_ROWS - 1) / MAX_ROWS;
  int64_t first = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t height = rows / count + (i < rows % count);
    visit(first, height);
    first += height;
  }
}

// c[2][rows][LANES] (+)= a[.][rows][LANES] * b
RF_INLINE void multiply_rows(const ProductTile& t, int64_t rows) {
  static constexpr auto tiles = product_tiles(RowCounts{});
  for_each_row_tile(rows, [&](int64_t first, int64_t height) { tiles[static_cast<size_t>(height - 1)](t, first); });
}

// The convolution of a run of output pixels; STRIDE as in multiply().
template <int STRIDE, class Out>
RF_INLINE void convolve_rows(const ConvTile<Out>& t, int64_t rows) {
  static constexpr auto tiles = conv_tiles<STRIDE, Out>(RowCounts{});
  for_each_row_tile(rows, [&](int64_t first, int64_t height) { tiles[static_cast<size_t>(height - 1)](t, first); });
}

// Pixels of a line that go into one tile together with those of the next: each weight is then read for both.
constexpr int64_t HALF_TILE = MAX_ROWS / 2;

// The convolution of two lines of `width` output pixels, up to HALF_TILE, whose results follow each other.
template <int STRIDE, class Out>
RF_INLINE void convolve_two_lines(const ConvTile<Out>& t, int64_t width) {
  static constexpr auto tiles = two_line_tiles<STRIDE, Out>(std::make_integer_sequence<int, HALF_TILE>{});
  tiles[static_cast<size_t>(width - 1)](t, 0);
}

}  // namespace resnet_fused::cpu::RF_ISA
