// 1 x 1 convolution: a matrix product over pixels, with the epilogue in the register tile.
#pragma once

#include "tile.h"

namespace resnet_fused::cpu::RF_ISA {

// Channels of p in the units that the register tile sums over.
RF_INLINE int64_t in_units(const ConvParams& p) { return p.in_channels / CHANNELS_PER_UNIT; }

// Rows of activations whose stride is a multiple of 4 KiB all map to one set of L1: they are copied into blocks first.
RF_INLINE bool rows_collide(int64_t channels) { return channels * static_cast<int64_t>(sizeof(float)) % 4096 == 0; }

// out[channel block][row][LANES] = the activations of `rows` pixels, `pixel(row)` giving where each begins.
template <class Pixel>
void copy_to_blocks(int64_t rows, int64_t channels, float* out, Pixel&& pixel) {
  for (int64_t row = 0; row < rows; ++row) {
    const Unit* from = pixel(row);
    float* to = out + row * LANES;
    for (int64_t c = 0; c < channels; c += LANES, to += rows * LANES) {
      const int64_t lanes = channels - c;
      store(to, lanes >= LANES ? load(from + c) : load(from + c, static_cast<int>(lanes)));
    }
  }
}

// Weights up to this many elements are left in L2 while rows of activations pass; larger ones pass over rows that stay.
constexpr int64_t RESIDENT_WEIGHTS = 64 * 1024;

// A matrix of activations as the register tile takes it: plain NHWC rows, or blocked by copy_to_blocks().
struct Rows {
  const float* data;
  int64_t count;
  int64_t channels;
  bool blocked;
};

// y[row][0..out_channels) of panels [first_panel, last_panel) for all rows. `residual` and `y` point at row 0.
inline void multiply_pointwise(const Rows& x, const float* weights, const float* bias, int64_t first_panel, int64_t last_panel,
                               const Activation* residual, Activation* y, int64_t out_channels,
                               const Nonlinearity& nonlinearity) {
  const float* taps[1];
  ConvTile<Activation> tile{};
  tile.taps = taps;
  tile.tap_count = 1;
  tile.row_stride = x.blocked ? LANES : x.channels;
  tile.block_stride = x.blocked ? x.count * LANES : LANES;
  tile.channels = x.channels;
  tile.pixel_stride = out_channels;
  tile.nonlinearity = nonlinearity;
  const auto multiply = [&](int64_t first_row, int64_t rows, int64_t panel) {
    const int64_t channel = panel * PANEL, at = first_row * out_channels + channel;
    taps[0] = x.data + first_row * tile.row_stride;
    tile.b = weights + channel * x.channels;
    tile.bias = bias + channel;
    tile.residual = residual == nullptr ? nullptr : residual + at;
    tile.y = y + at;
    tile.out_lanes = out_channels - channel;
    tile.ahead = !x.blocked && panel == first_panel ? std::min<int64_t>(rows, MAX_ROWS) * x.channels : 0;
    x.blocked ? convolve_rows<LANES>(tile, rows) : convolve_rows<RUNTIME_STRIDE>(tile, rows);
  };
  if ((last_panel - first_panel) * PANEL * x.channels <= RESIDENT_WEIGHTS) {
    // The weights stay in L2: each activation is read, and each row of the result written, in one go.
    for_each_row_tile(x.count, [&](int64_t first, int64_t rows) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) multiply(first, rows, panel);
    });
  } else {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) multiply(0, x.count, panel);
  }
}

// Pixels that go through the product together: their activations stay in L2 while the weights stream past.
constexpr int64_t POINTWISE_ROWS = 8 * MAX_ROWS;

// y = act(x w + bias + residual) for `count` neighbouring pixels (stride 1) and all output channels.
inline void pointwise_rows(const Unit* x, int64_t count, int64_t in_channels, const float* weights, const float* bias,
                           const Activation* residual, Activation* y, int64_t out_channels, const Nonlinearity& nonlinearity) {
  const int64_t panels = panel_count(out_channels);
  if (!WIDENED && !rows_collide(in_channels)) {
    const Rows rows{reinterpret_cast<const float*>(x), count, in_channels, false};
    multiply_pointwise(rows, weights, bias, 0, panels, residual, y, out_channels, nonlinearity);
    return;
  }
  Scratch scratch;
  float* copy = scratch.take<float>(std::min(count, POINTWISE_ROWS) * vector_count(in_channels) * LANES);
  for (int64_t first = 0; first < count; first += POINTWISE_ROWS) {
    const int64_t rows = std::min(POINTWISE_ROWS, count - first), at = first * out_channels;
    copy_to_blocks(rows, in_channels, copy, [&](int64_t row) { return x + (first + row) * in_channels; });
    multiply_pointwise({copy, rows, in_channels, true}, weights, bias, 0, panels, residual == nullptr ? nullptr : residual + at,
                       y + at, out_channels, nonlinearity);
  }
}

inline void pointwise(const ConvParams& p) {
  const int64_t pixels = p.batch * p.out_height * p.out_width, panels = panel_count(p.out_channels), channels = in_units(p);
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  const bool blocked = WIDENED || strided || rows_collide(channels);
  const Cut work = cut((pixels + POINTWISE_ROWS - 1) / POINTWISE_ROWS, std::max<int64_t>(pixels / MAX_ROWS, 1), panels,
                       pixels * channels * p.out_channels);
  const int64_t row_blocks = work.blocks, groups = work.groups;  // Clang before 16 captures no structured bindings
  const Unit* x = static_cast<const Unit*>(p.x);
  const Activation* residual = static_cast<const Activation*>(p.residual);
  Activation* y = static_cast<Activation*>(p.y);

  parallel_workers(row_blocks * groups, [&](Units& units) {
    Scratch scratch;
    float* copy = blocked ? scratch.take<float>((pixels / row_blocks + 1) * vector_count(channels) * LANES) : nullptr;
    for (int64_t copied = -1; units.take();) {
      const int64_t block = units.current() / groups, group = units.current() % groups;
      const int64_t begin = pixels * block / row_blocks, count = pixels * (block + 1) / row_blocks - begin;
      if (blocked && block != copied) {
        copy_to_blocks(count, channels, copy, [&](int64_t row) {
          const int64_t pixel = begin + row, n = pixel / (p.out_height * p.out_width);
          const int64_t h = pixel / p.out_width % p.out_height * p.stride_h, w = pixel % p.out_width * p.stride_w;
          return x + ((n * p.height + h) * p.width + w) * channels;
        });
        copied = block;
      }
      const int64_t at = begin * p.out_channels;
      multiply_pointwise({blocked ? copy : reinterpret_cast<const float*>(x + begin * channels), count, channels, blocked},
                         static_cast<const float*>(p.weights), p.bias, panels * group / groups, panels * (group + 1) / groups,
                         residual == nullptr ? nullptr : residual + at, y + at, p.out_channels, p.nonlinearity);
    }
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
