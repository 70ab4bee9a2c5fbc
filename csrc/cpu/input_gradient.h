// Gradient of a convolution's input, dx[h][w] = sum over kernel positions of dy[(h + pad - kh) / stride][(w + pad - kw) / stride]
// w[kh][kw], over those that the stride divides: direct arithmetic for any stride.
//
// dx falls into stride x stride phases. A pixel of dx in each phase makes a cell; all pixels of one phase take the same kernel
// positions of weights, and dy's pixels around their cell. Where a phase has no position (1 x 1 kernels), dx is zero.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "pointwise.h"
#include "tile.h"

namespace resnet_fused::cpu::RF_ISA {

inline void input_gradient(const InputGradientParams& p) {
  constexpr int64_t COPIES = 128 * 1024;  // elements of dy that stay in L2, copied for each kernel position
  const int64_t channels = p.out_channels / CHANNELS_PER_UNIT, vectors = vector_count(channels),
                taps_count = p.kernel * p.kernel;
  const int64_t down = (p.height + p.stride - 1) / p.stride, across = (p.width + p.stride - 1) / p.stride;
  const int64_t cells = p.batch * down * across, side = (p.kernel + p.stride - 1) / p.stride, most = side * side;
  const int64_t rows = std::clamp<int64_t>(COPIES / (most * vectors * LANES) / MAX_ROWS, 1, 8) * MAX_ROWS;
  const int64_t blocks = (cells + rows - 1) / rows, panels = panel_count(p.in_channels);
  const int64_t groups = std::min(panels, (4 * thread_count() + blocks - 1) / blocks);
  const float* dy = static_cast<const float*>(p.dy);
  Scratch shared;
  float* zeros = shared.take<float>(std::max<int64_t>(channels, PANEL));
  std::fill(zeros, zeros + std::max<int64_t>(channels, PANEL), 0.0f);

  parallel_units(blocks * groups, [&](int64_t unit, int64_t) {
    const int64_t block = unit / groups, first_panel = panels * (unit % groups) / groups;
    const int64_t last_panel = panels * (unit % groups + 1) / groups, channel = first_panel * PANEL;
    const int64_t begin = cells * block / blocks, count = cells * (block + 1) / blocks - begin;
    const int64_t width = std::min(last_panel * PANEL, p.in_channels) - channel;
    Scratch scratch;
    float* copies = scratch.take<float>(most * count * vectors * LANES);
    const float** taps = scratch.take<const float*>(most);
    Activation* results = scratch.take<Activation>(count * width);
    int64_t passed = 0;  // kernel positions of earlier phases
    for_each_phase(p.kernel, p.stride, p.pad, [&](int64_t row, int64_t column, auto&& positions) {
      int64_t found = 0;
      positions([&](int64_t kh, int64_t kw) {
        const int64_t h_offset = (row + p.pad - kh) / p.stride, w_offset = (column + p.pad - kw) / p.stride;
        float* copy = copies + found * count * vectors * LANES;
        copy_to_blocks(count, channels, copy, [&](int64_t i) {
          const int64_t cell = begin + i, n = cell / (down * across);
          const int64_t h = cell / across % down + h_offset, w = cell % across + w_offset;
          const bool inside = h >= 0 && h < p.out_height && w >= 0 && w < p.out_width;
          return inside ? dy + ((n * p.out_height + h) * p.out_width + w) * channels : zeros;
        });
        taps[found++] = copy;
      });
      for (int64_t panel = first_panel; found > 0 && panel < last_panel; ++panel) {
        const int64_t at = panel * PANEL - channel;
        ConvTile<Activation> tile{};
        tile.taps = taps, tile.tap_count = found;
        tile.row_stride = LANES, tile.block_stride = count * LANES, tile.channels = channels;
        tile.b = static_cast<const float*>(p.weights) + (panel * taps_count + passed) * channels * PANEL;
        tile.bias = zeros;
        tile.y = results + at, tile.pixel_stride = width, tile.out_lanes = width - at;
        convolve_rows<LANES>(tile, count);
      }
      passed += found;
      const size_t bytes = static_cast<size_t>(width) * sizeof(Activation);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t cell = begin + i, n = cell / (down * across);
        const int64_t h = cell / across % down * p.stride + row, w = cell % across * p.stride + column;
        if (h >= p.height || w >= p.width) continue;
        Activation* to = static_cast<Activation*>(p.dx) + ((n * p.height + h) * p.width + w) * p.in_channels + channel;
        found > 0 ? __builtin_memcpy(to, results + i * width, bytes) : __builtin_memset(to, 0, bytes);
      }
    });
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
