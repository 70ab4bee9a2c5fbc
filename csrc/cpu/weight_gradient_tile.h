// The register tile of the weights' gradient, dweight[o][tap][i] = sum over pixels p of dy[p][o] x[p at tap][i].
//
// A matrix product whose long dimension is summed away. Its steps are pixels (pairs of them in bfloat16), or for Winograd
// tiles of 4 x 4 pixels. The register tile holds up to MAX_ROWS output channels times PANEL input channels over a run of steps;
// it reads the rows of dy and x where they lie. Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// ---- The register tile --------------------------------------------------------------------------------------------------

// In bfloat16 `a` holds pairs of pixels, see pack_pixel_pairs(), and b two pointers a step.
template <class T>
struct OuterTile {
  const float* a;          // [step][a_stride], of which ROWS count
  int64_t a_stride;
  const T* const* b;       // [step]: a row of input channels
  int64_t b_offset;        // added to every row
  int64_t steps;
  float* c;                // [ROWS][c_stride]
  int64_t c_stride;
  int64_t lanes;           // input channels of the panel that exist
  bool accumulate;         // add to c
  // Rows to be used next, fetched into L2: bytes from `next_a` on, one row a step, and rows of b `next_b` steps further on.
  const char* next_a;
  int64_t next_a_stride;
  int64_t next_b;
};

// The weights' side of one step: two vectors of input channels, of which `lanes` exist if TAIL.
template <bool TAIL>
RF_INLINE void load_panel(const float* const* b, int64_t step, int64_t offset, int64_t lanes, vec& low, vec& high) {
  const float* row = b[step] + offset;
  const int n = static_cast<int>(lanes);
  low = TAIL && n < LANES ? load(row, n) : load(row);
  high = TAIL ? (n > LANES ? load(row + LANES, n - LANES) : zero()) : load(row + LANES);
}
RF_INLINE void order_panel(const float*, vec&, vec&) {}

#if defined(RF_ISA_IS_BF16)
// Two pixels' channels side by side as vdpbf16ps takes them, in the order that interleaving leaves: within each eight
// channels, four in `low` and four in `high`.
template <bool TAIL>
RF_INLINE void load_panel(const Bf16* const* b, int64_t step, int64_t offset, int64_t lanes, vec& low, vec& high) {
  const __mmask32 mask = TAIL ? static_cast<__mmask32>((uint64_t{1} << lanes) - 1u) : ~__mmask32{0};
  const __m512i first = _mm512_maskz_loadu_epi16(mask, b[2 * step] + offset);
  const __m512i second = _mm512_maskz_loadu_epi16(mask, b[2 * step + 1] + offset);
  low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(first, second));
  high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(first, second));
}
// Back to the channels' own order.
RF_INLINE void order_panel(const Bf16*, vec& low, vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const vec unordered = low;
  low = _mm512_permutex2var_ps(unordered, first, high);
  high = _mm512_permutex2var_ps(unordered, second, high);
}
#endif

template <class Products, class T, int ROWS, bool TAIL>
void outer_tile(const OuterTile<T>& t) {
  Accumulators<ROWS> acc;
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) acc.low[r] = acc.high[r] = zero();
  const float* a = t.a;
  const char* next_a = t.next_a;
  for (int64_t step = 0; step < t.steps; ++step, a += t.a_stride, next_a += t.next_a_stride) {
    vec b_low, b_high;
    load_panel<TAIL>(t.b, step, t.b_offset, t.lanes, b_low, b_high);
    prefetch_l2(next_a);
    for (int64_t i = 0; i < int64_t{4} / static_cast<int64_t>(sizeof(T)); ++i) {
      const char* next_b = reinterpret_cast<const char*>(t.b[(step + t.next_b) * (4 / static_cast<int64_t>(sizeof(T))) + i] + t.b_offset);
      prefetch_l2(next_b);
      if (PANEL * sizeof(T) > 64) prefetch_l2(next_b + 64);
    }
    RF_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      const vec x = splat(a[r]);
      acc.low[r] = Products::add(x, b_low, acc.low[r]);
      acc.high[r] = Products::add(x, b_high, acc.high[r]);
    }
  }
  float* c = t.c;
  RF_UNROLL(16)
  for (int r = 0; r < ROWS; ++r, c += t.c_stride) {
    vec low = acc.low[r], high = acc.high[r];
    order_panel(static_cast<const T*>(nullptr), low, high);
    // Sums of sums round less than one long sum.
    if (!TAIL) {
      store(c, t.accumulate ? add(low, load(c)) : low);
      store(c + LANES, t.accumulate ? add(high, load(c + LANES)) : high);
      continue;
    }
    const int n = static_cast<int>(t.lanes < LANES ? t.lanes : LANES), more = static_cast<int>(t.lanes) - n;
    store(c, t.accumulate ? add(low, load(c, n)) : low, n);
    if (more > 0) store(c + LANES, t.accumulate ? add(high, load(c + LANES, more)) : high, more);
  }
}

template <class T>
using OuterTileFunction = void (*)(const OuterTile<T>&);

template <class Products, class T, bool TAIL, int... N>
constexpr std::array<OuterTileFunction<T>, sizeof...(N)> outer_tiles(std::integer_sequence<int, N...>) {
  return {&outer_tile<Products, T, N + 1, TAIL>...};
}

// ---- The product over a run of steps ------------------------------------------------------------------------------------

// Blocks of channels: of nearly equal width, at most WIDTH; for input channels, whole panels.
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

// Where sums lie, [point][o][i].
struct Sums {
  float* data;
  int64_t point_stride, row_stride;
};

// The operands of one run and one point. `a` begins at output channel `a_channel`, its rows are block by block if a_block is
// not 0, else side by side.
template <class T>
struct Run {
  const float* a;
  int64_t a_stride, a_block;
  int64_t a_channel;
  const T* const* b;
  int64_t b_offset;
  int64_t steps;
  const T* next_a;         // dy of the next run, null: none
  int64_t next_a_stride;   // elements a step
  int64_t next_b;
};

// Adds a run to the sums of one part and one point.
template <class Products, class T>
void multiply_run(const Run<T>& run, const Part& part, int64_t out_channels, int64_t in_channels, float* sums,
                  int64_t row_stride, bool accumulate) {
  static constexpr auto whole = outer_tiles<Products, T, false>(RowCounts{});
  static constexpr auto tails = outer_tiles<Products, T, true>(RowCounts{});
  const OutBlocks blocks(out_channels);
  for (int64_t in = part.first_in; in < part.last_in; ++in) {
    const int64_t i = in * PANEL, lanes = in_channels - i;
    const auto& tiles = lanes >= PANEL ? whole : tails;
    for (int64_t out = part.first_out; out < part.last_out; ++out) {
      const int64_t o = blocks.begin(out);
      const float* a = run.a_block != 0 ? run.a + (out - part.first_out) * run.a_block : run.a + (o - run.a_channel);
      // What comes next is fetched once: dy along with the first panel, x along with the first block.
      const bool fetch_a = in == part.first_in && run.next_a != nullptr, fetch_b = out == part.first_out;
      tiles[static_cast<size_t>(blocks.width(out) - 1)](
          {a, run.a_stride, run.b, run.b_offset + i, run.steps, sums + o * row_stride + i, row_stride, lanes, accumulate,
           reinterpret_cast<const char*>(fetch_a ? run.next_a + o : reinterpret_cast<const T*>(a)),
           fetch_a ? run.next_a_stride * static_cast<int64_t>(sizeof(T)) : 0, fetch_b ? run.next_b : 0});
    }
  }
}

// Steps summed in registers in one go.
constexpr int64_t LONGEST_RUN = 256;

}  // namespace resnet_fused::cpu::RF_ISA
