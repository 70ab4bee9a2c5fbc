// Gradient of a convolution's weights, as a sum over pixels: see weight_gradient_tile.h for the product and docs/training.md.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "weight_gradient_tile.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// Blocks of dy's channels as the register tile takes them, [block][step][LANES]. Block i begins at channel begins[i].
inline void pack_steps(const Activation* const* rows, int64_t steps, const int64_t* begins, int64_t blocks, float* out,
                       int64_t block_stride) {
  constexpr int64_t GROUP = 4;  // steps, whose rows stay in L1 while block after block is taken from them
  for (int64_t step = 0; step < steps; step += GROUP) {
    const int64_t count = std::min(GROUP, steps - step);
    for (int64_t block = 0; block < blocks; ++block) {
      const int lanes = static_cast<int>(begins[block + 1] - begins[block]);
      float* to = out + block * block_stride + step * LANES;
      for (int64_t i = 0; i < count; ++i) {
        store(to + i * LANES, load_step(rows + (step + i) * CHANNELS_PER_UNIT, begins[block], lanes));
      }
    }
  }
}

// How the work is cut: into ranges of steps and parts of the weights.
struct PixelPlan {
  int64_t ranges, outs, ins;  // outs, ins: blocks and panels of a part
  int64_t out_groups, in_groups;
  int64_t run;  // steps

  PixelPlan(const WeightGradientParams& p, int64_t steps) {
    constexpr int64_t LARGEST_PART = 64 * 1024, RANGE = 1024, RUN_ELEMENTS = 64 * 1024;
    const int64_t points = p.kernel * p.kernel, panels = panel_count(p.in_channels), blocks = OutBlocks(p.out_channels).count;
    // Sums of a part stay in L2 while pixels pass. With many pixels each range has sums of its own, to be added up; parts that
    // are strips of rows would read memory in pieces.
    ranges = std::max<int64_t>(1, std::min<int64_t>(32, steps * CHANNELS_PER_UNIT / RANGE));
    ins = std::min<int64_t>(panels, points == 1 ? 16 : 4);
    in_groups = (panels + ins - 1) / ins;
    outs = std::max<int64_t>(1, std::min(blocks, LARGEST_PART / (points * ins * PANEL * MAX_ROWS)));
    // Where sums are cut doesn't depend on the number of threads.
    const int64_t width = outs * MAX_ROWS + ins * PANEL * (points == 1 ? 1 : p.stride * p.stride);
    run = std::max<int64_t>(32, std::min(LONGEST_RUN, RUN_ELEMENTS / width));
    // Fewer and larger parts pack less, but all threads shall be busy to the end.
    const int64_t units = 4 * thread_count();
    while (outs > 4 && ranges * in_groups * ((blocks + outs - 1) / outs) < units) outs = (outs + 1) / 2;
    out_groups = (blocks + outs - 1) / outs;
  }
};

// The rows of x that each kernel position puts on the results [begin, begin + count): [point][count].
inline void find_rows(const WeightGradientParams& p, int64_t begin, int64_t count, const Activation* zeros,
                      const Activation** rows) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  for (int64_t point = 0; point < p.kernel * p.kernel; ++point, rows += count) {
    const int64_t h_offset = point / p.kernel - p.pad, w_offset = point % p.kernel - p.pad;
    int64_t n = begin / (p.out_height * p.out_width), h = begin / p.out_width % p.out_height, w = begin % p.out_width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = h * p.stride + h_offset, column = w * p.stride + w_offset;
      const bool inside = begin + i < pixels && row >= 0 && row < p.height && column >= 0 && column < p.width;
      rows[i] =
          inside ? static_cast<const Activation*>(p.x) + ((n * p.height + row) * p.width + column) * p.in_channels : zeros;
      if (++w == p.out_width) {
        w = 0;
        if (++h == p.out_height) h = 0, ++n;
      }
    }
  }
}

// The lines of memory that rows' channels [begin, end) lie in, as columns: a line of one row of each step.
struct LineColumns {
  static constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(Activation));
  const Activation* const* rows;
  int64_t begin, count;

  LineColumns(const Activation* const* all, int64_t first, int64_t end, bool any)
      : rows(all), begin(first), count(any ? (end - first + LINE - 1) / LINE * CHANNELS_PER_UNIT : 0) {}

  LinesAhead operator[](int64_t i) const {
    return {reinterpret_cast<const void* const*>(rows + i % CHANNELS_PER_UNIT), CHANNELS_PER_UNIT,
            (begin + i / CHANNELS_PER_UNIT * LINE) * static_cast<int64_t>(sizeof(Activation))};
  }
};

// A run of steps on one part and one kernel position: packed blocks of dy times rows of x.
struct PixelRun {
  const float* a;
  int64_t a_block;  // between blocks
  const Activation* const* x;
  int64_t next_x;  // where the rows of the next run are
  LineColumns next_dy;
  int64_t steps;
};

// Adds a run to the sums at `sums`, [o][i]. `panel` holds a panel of x packed by its first tile.
inline void multiply_run(const PixelRun& run, const Part& part, const WeightGradientParams& p, float* sums, float* panel,
                         bool accumulate) {
  static constexpr auto first_tiles = outer_tiles<UnitProducts, true>(RowCounts{});
  static constexpr auto other_tiles = outer_tiles<UnitProducts, false>(RowCounts{});
  const OutBlocks blocks(p.out_channels);
  const int64_t row = p.kernel * p.kernel * p.in_channels;
  const void* const here[] = {panel};
  for (int64_t in = part.first_in; in < part.last_in; ++in) {
    for (int64_t out = part.first_out; out < part.last_out; ++out) {
      const int64_t block = out - part.first_out;
      const LinesAhead ahead = in == part.first_in && block < run.next_dy.count ? run.next_dy[block] : LinesAhead{here, 0, 0};
      const auto& tiles = block == 0 ? first_tiles : other_tiles;
      tiles[static_cast<size_t>(blocks.width(out) - 1)]({run.a + block * run.a_block,
                                                         LANES,
                                                         panel,
                                                         panel + LANES,
                                                         PANEL,
                                                         run.steps,
                                                         sums + blocks.begin(out) * row + in * PANEL,
                                                         row,
                                                         p.in_channels - in * PANEL,
                                                         accumulate,
                                                         {run.x, in * PANEL, run.next_x},
                                                         ahead});
    }
  }
}

// One range of steps on one part, whose sums lie as dweight does: [o][tap][i].
inline void sum_pixels(const WeightGradientParams& p, const PixelPlan& plan, const Part& part, int64_t begin, int64_t end,
                       const Activation* zeros, float* sums) {
  const int64_t points = p.kernel * p.kernel, pixels = p.batch * p.out_height * p.out_width;
  const int64_t runs = (end - begin + plan.run - 1) / plan.run, longest = (end - begin + runs - 1) / runs;
  const OutBlocks blocks(p.out_channels);
  const int64_t outs = part.last_out - part.first_out;

  Scratch scratch;
  // A run more than there is, so that lines ahead can be asked for without a look at the end.
  const int64_t row_count = (end - begin + longest) * CHANNELS_PER_UNIT;
  const Activation** x_rows = scratch.take<const Activation*>(points * row_count);
  find_rows(p, begin * CHANNELS_PER_UNIT, row_count, zeros, x_rows);
  const Activation** dy_rows = scratch.take<const Activation*>(row_count);
  for (int64_t i = 0; i < row_count; ++i) {
    const int64_t pixel = begin * CHANNELS_PER_UNIT + i;
    dy_rows[i] = pixel < pixels ? static_cast<const Activation*>(p.dy) + pixel * p.out_channels : zeros;
  }
  int64_t* out_begins = scratch.take<int64_t>(outs + 1);
  for (int64_t i = 0; i <= outs; ++i) out_begins[i] = blocks.begin(part.first_out + i);
  const int64_t stride = point_stride(longest);
  float* a = scratch.take<float>(outs * stride);
  float* panel = scratch.take<float>(longest * PANEL);

  for (int64_t r = 0; r < runs; ++r) {
    const int64_t first = (end - begin) * r / runs, steps = (end - begin) * (r + 1) / runs - first;
    const int64_t row = first * CHANNELS_PER_UNIT;
    pack_steps(dy_rows + row, steps, out_begins, outs, a, stride);
    for (int64_t point = 0; point < points; ++point) {
      // Lines of the next run's dy are fetched along with the first point.
      const LineColumns next_dy(dy_rows + row + steps * CHANNELS_PER_UNIT, out_begins[0], out_begins[outs],
                                point == 0 && r + 1 < runs);
      multiply_run({a, stride, x_rows + point * row_count + row, steps * CHANNELS_PER_UNIT, next_dy, steps}, part, p,
                   sums + point * p.in_channels, panel, r > 0);
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

inline void weight_gradient(const WeightGradientParams& p) {
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
    sum_pixels(p, plan, part, steps * range / plan.ranges, steps * (range + 1) / plan.ranges, zeros, partial + range * size);
  });
  if (plan.ranges > 1) add_ranges(partial, plan.ranges, size, p.dweight);
}

}  // namespace resnet_fused::cpu::RF_ISA
