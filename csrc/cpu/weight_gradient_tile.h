// The register tile of the weights' gradient, dweight[o][tap][i] = sum over pixels p of dy[p][o] x[p at tap][i].
//
// A matrix product whose long dimension is summed away. Its steps are pixels (pairs of them in bfloat16), or for Winograd
// tiles of 4 x 4 pixels. The register tile holds up to MAX_ROWS output channels times PANEL input channels over a run of steps.
// x is packed panel by panel, by the first tile that multiplies with it: in a pass of its own that would take longer than
// beside the products, and the other tiles then find it in L1 whatever the distance of its rows.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "tile.h"

namespace resnet_fused::cpu::RF_ISA {

// ---- The register tile --------------------------------------------------------------------------------------------------

// A line of memory a step to fetch into L2, for later: at `offset` bytes from rows[step * stride].
struct LinesAhead {
  const void* const* rows;
  int64_t stride, offset;
};

// What the first tile of a panel takes from the rows of x and leaves packed for the others.
struct PanelRows {
  const Activation* const* rows;  // [step][CHANNELS_PER_UNIT]
  int64_t channel;                // where the panel begins in a row
  int64_t next;                   // rows to be used `next` pointers further on are fetched into L2
};

struct OuterTile {
  const float* a;  // [step][a_stride], of which ROWS count
  int64_t a_stride;
  float* b_low;  // [step][b_stride]: the panel's two vectors
  float* b_high;
  int64_t b_stride;
  int64_t steps;
  float* c;  // [ROWS][c_stride]
  int64_t c_stride;
  int64_t lanes;    // input channels of the panel that exist
  bool accumulate;  // add to c
  PanelRows x;
  LinesAhead ahead;
};

template <class Products, int ROWS, bool FIRST>
void outer_tile(const OuterTile& t) {
  Accumulators<ROWS> acc;
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) acc.low[r] = acc.high[r] = zero();
  const float* a = t.a;
  float *b_low = t.b_low, *b_high = t.b_high;
  const Activation* const* x = t.x.rows;
  const void* const* ahead = t.ahead.rows;
  for (int64_t step = 0; step < t.steps; ++step, a += t.a_stride, b_low += t.b_stride, b_high += t.b_stride) {
    vec low, high;
    if constexpr (FIRST) {
      load_panel(x, t.x.channel, t.lanes, low, high);
      store(b_low, low);
      store(b_high, high);
      for (int64_t i = 0; i < CHANNELS_PER_UNIT; ++i) {
        const Activation* next = x[t.x.next + i] + t.x.channel;
        prefetch_l2(next);
        if (PANEL * sizeof(Activation) > 64) prefetch_l2(next + LANES);
      }
      x += CHANNELS_PER_UNIT;
    } else {
      low = load(b_low);
      high = load(b_high);
    }
    prefetch_l2(static_cast<const char*>(*ahead) + t.ahead.offset);
    ahead += t.ahead.stride;
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      const vec one = splat(a[r]);
      acc.low[r] = Products::add(one, low, acc.low[r]);
      acc.high[r] = Products::add(one, high, acc.high[r]);
    }
  }
  float* c = t.c;
  const int n = static_cast<int>(t.lanes < LANES ? t.lanes : LANES), more = static_cast<int>(t.lanes) - n;
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r, c += t.c_stride) {
    vec low = acc.low[r], high = acc.high[r];
    order_panel(low, high);
    // Sums of sums round less than one long sum.
    if (t.lanes >= PANEL) {
      store(c, t.accumulate ? add(low, load(c)) : low);
      store(c + LANES, t.accumulate ? add(high, load(c + LANES)) : high);
      continue;
    }
    store(c, t.accumulate ? add(low, load(c, n)) : low, n);
    if (more > 0) store(c + LANES, t.accumulate ? add(high, load(c + LANES, more)) : high, more);
  }
}

using OuterTileFunction = void (*)(const OuterTile&);

template <class Products, bool FIRST, int... N>
constexpr std::array<OuterTileFunction, sizeof...(N)> outer_tiles(std::integer_sequence<int, N...>) {
  return {&outer_tile<Products, N + 1, FIRST>...};
}

// ---- The product over a run of steps ------------------------------------------------------------------------------------

// Blocks of output channels: of nearly equal width, at most MAX_ROWS.
struct OutBlocks {
  int64_t channels, count;
  explicit OutBlocks(int64_t all) : channels(all), count((all + MAX_ROWS - 1) / MAX_ROWS) {}
  RF_INLINE int64_t begin(int64_t block) const { return channels * block / count; }
  RF_INLINE int64_t width(int64_t block) const { return begin(block + 1) - begin(block); }
};

// A part of the weights: blocks [first_out, last_out) of output channels, panels [first_in, last_in) of input channels.
struct Part {
  int64_t first_out, last_out, first_in, last_in;
};

// Steps summed in registers in one go.
constexpr int64_t LONGEST_RUN = 256;

}  // namespace resnet_fused::cpu::RF_ISA
