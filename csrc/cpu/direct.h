// Direct convolution for any kernel, stride, padding and dilation: a few input rows are copied into padded, blocked rows, in
// which the activations of neighbouring output pixels lie next to each other for every kernel position; the register tile then
// sums over the kernel positions.
#pragma once

#include "pointwise.h"
#include "tile.h"

namespace resnet_fused::cpu::RF_ISA {

// A padded row, its columns sorted by phase (column mod stride): [phase][channel block][column][LANES].
struct PaddedRows {
  int64_t columns;       // of one phase
  int64_t channels;      // of a pixel, in units
  int64_t vectors;       // channel blocks
  int64_t block_stride;  // between channel blocks
  int64_t phase_stride;
  int64_t row_stride;

  explicit PaddedRows(const ConvParams& p)
      : columns(p.out_width + (p.kernel_w - 1) * p.dilation_w / p.stride_w),
        channels(in_units(p)),
        vectors(vector_count(channels)),
        block_stride(columns * LANES),
        phase_stride(block_stride * vectors),
        row_stride((phase_stride * p.stride_w) | LANES) {}

  void copy(const ConvParams& p, const Unit* row, float* out) const {
    for (int64_t phase = 0; phase < p.stride_w; ++phase) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t w = column * p.stride_w + phase - p.pad_w;
        const bool inside = row != nullptr && w >= 0 && w < p.width;
        const Unit* from = row + (inside ? w : 0) * channels;
        float* to = out + phase * phase_stride + column * LANES;
        for (int64_t c = 0; c < channels; c += LANES, to += block_stride) {
          const int64_t lanes = channels - c;
          store(to, !inside ? zero() : lanes >= LANES ? load(from + c) : load(from + c, static_cast<int>(lanes)));
        }
      }
    }
  }
};

// Output rows that are computed together: as many as keep their input rows within half of L2.
inline int64_t direct_row_block(const ConvParams& p, const PaddedRows& layout) {
  constexpr int64_t BUDGET = 512 * 1024 / sizeof(float);
  const int64_t fixed = (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t rows = (BUDGET / layout.row_stride - fixed) / p.stride_h + 1;
  return std::max<int64_t>(1, std::min(rows, p.out_height));
}

inline void direct(const ConvParams& p) {
  const PaddedRows layout(p);
  const int64_t panels = panel_count(p.out_channels), taps_count = p.kernel_h * p.kernel_w;
  const int64_t fewest = (p.out_height + direct_row_block(p, layout) - 1) / direct_row_block(p, layout);
  const int64_t multiply_adds = p.batch * p.out_height * p.out_width * p.out_channels * taps_count * layout.channels;
  const Cut work = cut(p.batch * fewest, p.batch * p.out_height, panels, multiply_adds);
  const int64_t groups = work.groups, row_blocks = std::min((work.blocks + p.batch - 1) / p.batch, p.out_height);
  const int64_t blocks = p.batch * row_blocks;

  parallel_workers(blocks * groups, [&](Units& units) {
    const int64_t channels = layout.channels;
    const int64_t most_out_rows = (p.out_height + row_blocks - 1) / row_blocks;
    const int64_t most_rows = (most_out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
    const Activation* residual = static_cast<const Activation*>(p.residual);
    Scratch scratch;
    float* rows = scratch.take<float>(most_rows * layout.row_stride);
    const float** taps = scratch.take<const float*>(taps_count);
    for (int64_t copied = -1; units.take();) {
      const int64_t group = units.current() % groups, image_block = units.current() / groups;
      const int64_t n = image_block / row_blocks, block = image_block % row_blocks;
      const int64_t o_begin = p.out_height * block / row_blocks, o_end = p.out_height * (block + 1) / row_blocks;
      if (image_block != copied) {
        const int64_t h_begin = o_begin * p.stride_h - p.pad_h;
        const int64_t h_count = (o_end - o_begin - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
        const Unit* image = static_cast<const Unit*>(p.x) + n * p.height * p.width * channels;
        for (int64_t i = 0; i < h_count; ++i) {
          const int64_t h = h_begin + i;
          layout.copy(p, h >= 0 && h < p.height ? image + h * p.width * channels : nullptr, rows + i * layout.row_stride);
        }
        copied = image_block;
      }

      for (int64_t panel = panels * group / groups; panel < panels * (group + 1) / groups; ++panel) {
        const int64_t channel = panel * PANEL;
        for (int64_t o = o_begin, lines; o < o_end; o += lines) {
          lines = p.out_width <= HALF_TILE && o + 1 < o_end ? 2 : 1;
          for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
            const float* row = rows + ((o - o_begin) * p.stride_h + kh * p.dilation_h) * layout.row_stride;
            for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
              const int64_t column = kw * p.dilation_w;
              taps[kh * p.kernel_w + kw] = row + column % p.stride_w * layout.phase_stride + column / p.stride_w * LANES;
            }
          }
          const int64_t at = ((n * p.out_height + o) * p.out_width) * p.out_channels + channel;
          const ConvTile<Activation> tile{taps,
                                          taps_count,
                                          p.stride_h * layout.row_stride,
                                          layout.block_stride,
                                          channels,
                                          0,
                                          static_cast<const float*>(p.weights) + channel * taps_count * channels,
                                          p.bias + channel,
                                          residual == nullptr ? nullptr : residual + at,
                                          static_cast<Activation*>(p.y) + at,
                                          p.out_channels,
                                          p.out_channels - channel,
                                          p.nonlinearity};
          lines == 2 ? convolve_two_lines<LANES>(tile, p.out_width) : convolve_rows<LANES>(tile, p.out_width);
        }
      }
    }
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
