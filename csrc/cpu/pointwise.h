// 1 x 1 convolution: a matrix product over pixels, with the epilogue in the register tile.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// Rows of activations whose stride is a multiple of 4 KiB all map to one set of L1: they are copied into blocks first.
RF_INLINE bool rows_collide(int64_t channels) { return channels * static_cast<int64_t>(sizeof(float)) % 4096 == 0; }

// out[channel block][row][LANES] = the activations of `rows` pixels, `pixel(row)` giving where each begins.
template <class T, class Pixel>
void copy_to_blocks(int64_t rows, int64_t channels, float* out, Pixel&& pixel) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = pixel(row);
    float* to = out + row * LANES;
    for (int64_t c = 0; c < channels; c += LANES, to += rows * LANES) {
      const int64_t lanes = channels - c;
      store(to, lanes >= LANES ? load(from + c) : load(from + c, static_cast<int>(lanes)));
    }
  }
}

// A matrix of activations as the register tile takes it: plain NHWC rows, or blocked by copy_to_blocks().
struct Rows {
  const float* data;
  int64_t count;
  int64_t channels;
  bool blocked;
};

// y[row][0..out_channels) of panels [first_panel, last_panel) for all rows. `residual` and `y` point at row 0.
inline void multiply_pointwise(const Rows& x, const float* weights, const float* shift, int64_t first_panel,
                               int64_t last_panel, const float* residual, float* y, int64_t out_channels, bool relu) {
  const float* taps[1] = {x.data};
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t channel = panel * PANEL;
    const ConvTile<float> tile{taps,
                               1,
                               0,
                               x.blocked ? LANES : x.channels,
                               x.blocked ? x.count * LANES : LANES,
                               x.channels,
                               weights + channel * x.channels,
                               shift + channel,
                               residual == nullptr ? nullptr : residual + channel,
                               y + channel,
                               out_channels,
                               out_channels - channel,
                               relu};
    x.blocked ? convolve_rows<LANES>(tile, x.count) : convolve_rows<RUNTIME_STRIDE>(tile, x.count);
  }
}

// Pixels that go through the product together: their activations stay in L2 while the weights stream past.
constexpr int64_t POINTWISE_ROWS = 4 * MAX_ROWS;

inline void pointwise(const ConvParams& p) {
  const int64_t pixels = p.batch * p.out_height * p.out_width, panels = panel_count(p.out_channels);
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  const bool blocked = strided || rows_collide(p.in_channels);
  const int64_t row_blocks = (pixels + POINTWISE_ROWS - 1) / POINTWISE_ROWS;
  // Few pixels (deep layers at batch 1): the panels are shared out as well, to four units a thread.
  const int64_t wanted = (4 * thread_count() + row_blocks - 1) / row_blocks;
  const int64_t groups = std::min(panels, wanted);
  const float* x = static_cast<const float*>(p.x);
  const float* residual = static_cast<const float*>(p.residual);
  float* y = static_cast<float*>(p.y);

  parallel_units(row_blocks * groups, [&](int64_t unit, int64_t) {
    const int64_t block = unit / groups, group = unit % groups;
    const int64_t begin = pixels * block / row_blocks, count = pixels * (block + 1) / row_blocks - begin;
    Scratch scratch;
    Rows rows{x + begin * p.in_channels, count, p.in_channels, blocked};
    if (blocked) {
      float* copy = scratch.take<float>(count * vector_count(p.in_channels) * LANES);
      copy_to_blocks<float>(count, p.in_channels, copy, [&](int64_t row) {
        const int64_t pixel = begin + row, n = pixel / (p.out_height * p.out_width);
        const int64_t h = pixel / p.out_width % p.out_height * p.stride_h, w = pixel % p.out_width * p.stride_w;
        return x + ((n * p.height + h) * p.width + w) * p.in_channels;
      });
      rows.data = copy;
    }
    const int64_t at = begin * p.out_channels;
    multiply_pointwise(rows, static_cast<const float*>(p.weights), p.shift, panels * group / groups,
                       panels * (group + 1) / groups, residual == nullptr ? nullptr : residual + at, y + at, p.out_channels,
                       p.relu);
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
