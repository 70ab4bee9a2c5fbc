// Gradient of a convolution's weights, as a sum over pixels: see weight_gradient_tile.h for the product and docs/training.md.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

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
