// Gradient of a convolution's weights: dweight[o][tap][i] = sum over pixels p of dy[p][o] x[p at tap][i]. See docs/training.md.
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

// ---- Pixels -------------------------------------------------------------------------------------------------------------

// Pairs of pixels side by side, of blocks [first, last) of output channels: [block][step][LANES].
#if defined(RF_ISA_IS_BF16)
inline void pack_pixel_pairs(const Bf16* dy, const Bf16* zeros, int64_t pixels, int64_t channels, const OutBlocks& blocks,
                             int64_t first, int64_t last, float* out, int64_t block_stride) {
  constexpr int64_t GROUP = 4;  // steps
  for (int64_t step = 0; 2 * step < pixels; step += GROUP) {
    const int64_t count = std::min(GROUP, (pixels + 1) / 2 - step);
    for (int64_t block = first; block < last; ++block) {
      const int lanes = static_cast<int>(blocks.width(block));
      const Bf16* row = dy + 2 * step * channels + blocks.begin(block);
      float* to = out + (block - first) * block_stride + step * LANES;
      for (int64_t i = 0; i < count; ++i, row += 2 * channels, to += LANES) {
        const Bf16* other = 2 * (step + i) + 1 < pixels ? row + channels : zeros;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(lanes), row));
        store(to, _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(load(other, lanes)))));
      }
    }
  }
}
#endif

// How the work is cut: into ranges of steps and parts of the weights.
struct PixelPlan {
  int64_t ranges, outs, ins;  // outs, ins: blocks and panels of a part
  int64_t out_groups, in_groups;
  int64_t run;                // steps

  PixelPlan(const WeightGradientParams& p, int64_t steps) {
    constexpr int64_t LARGEST_PART = 64 * 1024, RANGE = 1024, UNITS = 24, RUN_ELEMENTS = 64 * 1024;
    const int64_t points = p.kernel * p.kernel, panels = panel_count(p.in_channels), blocks = OutBlocks(p.out_channels).count;
    // Sums of a part stay in L2 while pixels pass. With many pixels each range has sums of its own, to be added up; parts that
    // are strips of rows would read memory in pieces.
    ranges = std::max<int64_t>(1, std::min<int64_t>(32, steps * CHANNELS_PER_UNIT / RANGE));
    ins = std::min<int64_t>(panels, points == 1 ? 16 : 4);
    in_groups = (panels + ins - 1) / ins;
    outs = std::max<int64_t>(1, std::min(blocks, LARGEST_PART / (points * ins * PANEL * MAX_ROWS)));
    while (outs > 4 && ranges * in_groups * ((blocks + outs - 1) / outs) < UNITS) outs = (outs + 1) / 2;
    out_groups = (blocks + outs - 1) / outs;
    const int64_t width = outs * MAX_ROWS + ins * PANEL * (points == 1 ? 1 : p.stride * p.stride);
    run = std::max<int64_t>(32, std::min(LONGEST_RUN, RUN_ELEMENTS / width));
  }
};

// The rows of x that each kernel position puts on the results [begin, begin + count): [point][count].
inline void find_rows(const WeightGradientParams& p, int64_t begin, int64_t count, const Activation* zeros,
                      const Activation** rows, int64_t point_stride) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  for (int64_t point = 0; point < p.kernel * p.kernel; ++point) {
    const int64_t h_offset = point / p.kernel - p.pad, w_offset = point % p.kernel - p.pad;
    int64_t n = begin / (p.out_height * p.out_width), h = begin / p.out_width % p.out_height, w = begin % p.out_width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = h * p.stride + h_offset, column = w * p.stride + w_offset;
      const bool inside = begin + i < pixels && row >= 0 && row < p.height && column >= 0 && column < p.width;
      rows[point * point_stride + i] =
          inside ? static_cast<const Activation*>(p.x) + ((n * p.height + row) * p.width + column) * p.in_channels : zeros;
      if (++w == p.out_width) {
        w = 0;
        if (++h == p.out_height) h = 0, ++n;
      }
    }
  }
}

// One range of steps on one part.
inline void sum_pixels(const WeightGradientParams& p, const PixelPlan& plan, const Part& part, int64_t begin, int64_t end,
                       const Activation* zeros, const Sums& sums) {
  const int64_t points = p.kernel * p.kernel, pixels = p.batch * p.out_height * p.out_width;
  const int64_t runs = (end - begin + plan.run - 1) / plan.run, longest = (end - begin + runs - 1) / runs;
  const OutBlocks blocks(p.out_channels);
  Scratch scratch;
  // One run more than there is, so that rows ahead can be asked for without a look at the end.
  const int64_t rows_stride = (end - begin + longest) * CHANNELS_PER_UNIT;
  const Activation** rows = scratch.take<const Activation*>(points * rows_stride);
  find_rows(p, begin * CHANNELS_PER_UNIT, rows_stride, zeros, rows, rows_stride);
  const Activation* dy = static_cast<const Activation*>(p.dy);
#if defined(RF_ISA_IS_BF16)
  const int64_t block_stride = point_stride(longest);
  float* pairs = scratch.take<float>(block_stride * (part.last_out - part.first_out));
#endif
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t first = begin + (end - begin) * r / runs, last = begin + (end - begin) * (r + 1) / runs;
    const Activation* now = dy + first * CHANNELS_PER_UNIT * p.out_channels;
    Run<Activation> run{};
#if defined(RF_ISA_IS_BF16)
    pack_pixel_pairs(now, zeros, std::min(2 * last, pixels) - 2 * first, p.out_channels, blocks, part.first_out, part.last_out,
                     pairs, block_stride);
    run.a = pairs, run.a_stride = LANES, run.a_block = block_stride;
#else
    (void)pixels;
    run.a = now, run.a_stride = p.out_channels;
#endif
    run.steps = last - first;
    run.next_a = last < end ? dy + last * CHANNELS_PER_UNIT * p.out_channels : nullptr;
    run.next_a_stride = CHANNELS_PER_UNIT * p.out_channels;
    run.next_b = longest;
    for (int64_t point = 0; point < points; ++point) {
      run.b = rows + point * rows_stride + (first - begin) * CHANNELS_PER_UNIT;
      multiply_run<UnitProducts>(run, part, p.out_channels, p.in_channels, sums.data + point * sums.point_stride,
                                 sums.row_stride, r > 0);
    }
  }
}

// Adds up the sums of all ranges, in a fixed order.
inline void add_ranges(const float* partial, int64_t ranges, int64_t size, float* total) {
  constexpr int64_t PIECE = 64 * LANES;
  parallel_units((size + PIECE - 1) / PIECE, [&](int64_t piece, int64_t) {
    for (int64_t i = piece * PIECE; i < std::min(size, (piece + 1) * PIECE); i += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
      vec sum = load(partial + i, lanes);
      for (int64_t range = 1; range < ranges; ++range) sum = add(sum, load(partial + range * size + i, lanes));
      store(total + i, sum, lanes);
    }
  });
}

inline void weight_gradient_by_pixels(const WeightGradientParams& p) {
  const int64_t steps = (p.batch * p.out_height * p.out_width + CHANNELS_PER_UNIT - 1) / CHANNELS_PER_UNIT;
  const int64_t taps = p.kernel * p.kernel, size = p.out_channels * taps * p.in_channels;
  const int64_t blocks = OutBlocks(p.out_channels).count, panels = panel_count(p.in_channels);
  const PixelPlan plan(p, steps);
  Scratch scratch;
  const int64_t zero_count = std::max(p.in_channels, p.out_channels);
  Activation* zeros = scratch.take<Activation>(zero_count);
  __builtin_memset(zeros, 0, static_cast<size_t>(zero_count) * sizeof(Activation));
  float* partial = plan.ranges > 1 ? scratch.take<float>(plan.ranges * size) : p.dweight;
  parallel_units(plan.ranges * plan.out_groups * plan.in_groups, [&](int64_t unit, int64_t) {
    const int64_t in = unit % plan.in_groups, out = unit / plan.in_groups % plan.out_groups;
    const int64_t range = unit / plan.in_groups / plan.out_groups;
    const Part part{blocks * out / plan.out_groups, blocks * (out + 1) / plan.out_groups, panels * in / plan.in_groups,
                    panels * (in + 1) / plan.in_groups};
    // As dweight lies: [o][tap][i].
    sum_pixels(p, plan, part, steps * range / plan.ranges, steps * (range + 1) / plan.ranges, zeros,
               {partial + range * size, p.in_channels, taps * p.in_channels});
  });
  if (plan.ranges > 1) add_ranges(partial, plan.ranges, size, p.dweight);
}

// ---- Winograd -----------------------------------------------------------------------------------------------------------

#if !defined(RF_ISA_IS_BF16)
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
// Elements of transformed tiles that are held at a time: 8 MiB, within the last-level cache.
constexpr int64_t LARGEST_ROUND = int64_t{2} << 20;

// All threads transform a round of tiles, [point][tile][channel], then share out the points and output channels.
template <class T>
void weight_gradient_by_tiles(const WeightGradientParams& p) {
  constexpr int64_t POINTS = F4::A * F4::A, OUTS = 10, INS = 4;
  const int64_t down = (p.height + F4::M - 1) / F4::M, across = (p.width + F4::M - 1) / F4::M, tiles = p.batch * down * across;
  const int64_t in_row = vector_count(p.in_channels) * LANES, out_row = vector_count(p.out_channels) * LANES;
  const int64_t rounds = (tiles * POINTS * (in_row + out_row) + LARGEST_ROUND - 1) / LARGEST_ROUND;
  const int64_t most = (tiles + rounds - 1) / rounds, point = p.out_channels * p.in_channels;
  const int64_t v_stride = point_stride(most * in_row / LANES), e_stride = point_stride(most * out_row / LANES);
  const int64_t blocks = OutBlocks(p.out_channels).count, panels = panel_count(p.in_channels);
  const int64_t out_groups = (blocks + OUTS - 1) / OUTS, in_groups = (panels + INS - 1) / INS;
  Scratch scratch;
  float* v = scratch.take<float>(POINTS * v_stride);
  float* e = scratch.take<float>(POINTS * e_stride);
  float* du = scratch.take<float>(POINTS * point);
  const float** rows = scratch.take<const float*>(most);
  for (int64_t tile = 0; tile < most; ++tile) rows[tile] = v + tile * in_row;
  T* zeros = scratch.take<T>(std::max(in_row, out_row));
  __builtin_memset(zeros, 0, static_cast<size_t>(std::max(in_row, out_row)) * sizeof(T));
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = tiles * round / rounds, count = tiles * (round + 1) / rounds - begin;
    parallel_units(count, [&](int64_t i, int64_t) {
      const int64_t tile = begin + i, n = tile / (down * across);
      const int64_t top = tile / across % down * F4::M, left = tile % across * F4::M;
      const T* x = static_cast<const T*>(p.x) + n * p.height * p.width * p.in_channels;
      const T* dy = static_cast<const T*>(p.dy) + n * p.height * p.width * p.out_channels;
      transform_input_tile<F4, T>({x, 0, p.height, p.width, p.in_channels}, top - F4::PAD, left - F4::PAD, zeros,
                                  v + i * in_row, v_stride, LANES);
      transform_gradient_tile<T>({dy, 0, p.height, p.width, p.out_channels}, top, left, zeros, e + i * out_row, e_stride);
    });
    parallel_units(POINTS * out_groups * in_groups, [&](int64_t unit, int64_t) {
      const int64_t in = unit % in_groups, out = unit / in_groups % out_groups, at = unit / in_groups / out_groups;
      const Part part{blocks * out / out_groups, blocks * (out + 1) / out_groups, panels * in / in_groups,
                      panels * (in + 1) / in_groups};
      const int64_t runs = (count + LONGEST_RUN - 1) / LONGEST_RUN;
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t first = count * r / runs;
        Run<float> run{};
        run.a = e + at * e_stride + first * out_row, run.a_stride = out_row;
        run.b = rows + first, run.b_offset = at * v_stride;
        run.steps = count * (r + 1) / runs - first;
        multiply_run<FloatProducts>(run, part, p.out_channels, p.in_channels, du + at * point, p.in_channels,
                                    round > 0 || r > 0);
      }
    });
  }
  transform_weight_gradient(p, du);
}
#endif

inline void weight_gradient(const WeightGradientParams& p) {
#if !defined(RF_ISA_IS_BF16)
  if (p.winograd) {
    p.bfloat16 ? weight_gradient_by_tiles<Bf16>(p) : weight_gradient_by_tiles<float>(p);
    return;
  }
#endif
  weight_gradient_by_pixels(p);
}

}  // namespace resnet_fused::cpu::RF_ISA
