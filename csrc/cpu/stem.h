// The stem: 7 x 7 convolution of stride 2 with ReLU and max-pool in one pass, by Winograd.
//
// Stride 2 splits the image into four phases (even and odd rows and columns). Stacked as channels, they make an image of half
// the size with 4 C channels, on which the convolution has stride 1 and 4 x 4 taps (with a zero row and column before the
// seven): F(3 x 3, 4 x 4) needs 36 products where the direct sum has 9 x 49 / 4 = 110 for each of the 4 C channels.
// Rows pass through the stages strip by strip: phases, Winograd, pool; everything between x and y stays in L2.
#pragma once

#include "row_buffer.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// Row `s` of the image of phases: out[w] = x[2s][2w], x[2s][2w + 1], x[2s + 1][2w], x[2s + 1][2w + 1], all channels each.
template <class T>
void copy_phases(const StemParams& p, const T* image, int64_t s, float* out) {
  const int64_t channels = p.in_channels, pixel = 4 * channels;
  for (int64_t phase = 0; phase < 4; ++phase) {
    const int64_t row = 2 * s + phase / 2, column = phase % 2;
    const int64_t inside = row < p.height ? (p.width + 1 - column) / 2 : 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = image + row * p.x_stride_h + column * p.x_stride_w + c * p.x_stride_c;
      float* to = out + phase * channels + c;
      for (int64_t w = 0; w < inside; ++w) to[w * pixel] = widen(from[2 * w * p.x_stride_w]);
      for (int64_t w = inside; w < p.conv_width(); ++w) to[w * pixel] = 0.0f;
    }
  }
}

// y row = 3 x 3 max-pool of stride 2 around conv row 2q of `rows`, which holds results of a ReLU.
template <class T>
void pool_row(const StemParams& p, const RowBuffer<float>& rows, int64_t q, float* highest, T* y) {
  const int64_t width = p.conv_width(), channels = p.out_channels, row_size = width * channels;
  const float* middle = rows.row(2 * q);
  const float* above = q > 0 ? rows.row(2 * q - 1) : middle;
  const float* below = 2 * q + 1 < p.conv_height() ? rows.row(2 * q + 1) : middle;
  for (int64_t i = 0; i < row_size; i += LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(row_size - i, LANES));
    if (lanes == LANES) {
      store(highest + i, max_magnitude(load(middle + i), max_magnitude(load(above + i), load(below + i))));
    } else {
      store(highest + i, max_magnitude(load(middle + i, lanes), max_magnitude(load(above + i, lanes), load(below + i, lanes))),
            lanes);
    }
  }
  for (int64_t w = 0; w < p.out_width(); ++w) {
    const float* centre = highest + 2 * w * channels;
    const float* left = w > 0 ? centre - channels : centre;
    const float* right = 2 * w + 1 < width ? centre + channels : centre;
    for (int64_t c = 0; c < channels; c += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(channels - c, LANES));
      if (lanes == LANES) {
        store(y + w * channels + c, max_magnitude(load(centre + c), max_magnitude(load(left + c), load(right + c))));
      } else {
        store(y + w * channels + c,
              max_magnitude(load(centre + c, lanes), max_magnitude(load(left + c, lanes), load(right + c, lanes))), lanes);
      }
    }
  }
}

template <class T>
void copy_row(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(count - i, LANES));
    lanes == LANES ? store(to + i, load(from + i)) : store(to + i, load(from + i, lanes), lanes);
  }
}

template <class T>
void stem_rows(const StemParams& p, const TransformedWeights& weights, int64_t n, int64_t begin, int64_t end) {
  using F = Stem34;
  const int64_t height = p.conv_height(), width = p.conv_width(), across = (width + F::M - 1) / F::M;
  const T* image = static_cast<const T*>(p.x) + n * p.x_stride_n;
  T* y = static_cast<T*>(p.y) + n * p.out_height() * p.out_width() * p.out_channels;
  Scratch scratch;
  RowBuffer<float> phases(scratch, F::A, height, width, 4 * p.in_channels);
  RowBuffer<float> rows(scratch, F::M + 3, height, width, p.out_channels);
  float* highest = scratch.take<float>(width * p.out_channels);

  // Rows [begin, end) of y come from conv rows [first, last).
  const int64_t first = p.pool ? std::max<int64_t>(2 * begin - 1, 0) : begin, last = p.pool ? std::min(2 * end, height) : end;
  phases.restart(std::max<int64_t>(first - F::PAD, 0));
  rows.restart(first);
  int64_t out = begin;
  for (int64_t top = first; top < last; top += F::M) {
    phases.keep_from(std::max<int64_t>(top - F::PAD, 0));
    for (const int64_t needed = std::min(top - F::PAD + F::A, height); phases.end() < needed;) {
      const int64_t s = phases.end();
      phases.grow_to(s + 1);
      copy_phases(p, image, s, phases.row(s));
    }
    const bool trusted = winograd_tiles<F, float>(
        weights, TileRuns::all_full(across), 1,
        [&](int64_t t) -> TilePlace<float> {
          return {phases.strip<const float>(), {}, rows.strip<float>(), top, t * F::M, F::M, F::M};
        },
        [] {});
    note(trusted, p.declined);
    rows.grow_to(std::min(top + F::M, height));
    const auto ready = [&] {
      return out < end && (p.pool ? std::min(2 * out + 2, height) : out + 1) <= rows.end();
    };
    for (; ready(); ++out) {
      T* to = y + out * p.out_width() * p.out_channels;
      p.pool ? pool_row(p, rows, out, highest, to) : copy_row(rows.row(out), width * p.out_channels, to);
    }
    rows.keep_from(p.pool ? std::max<int64_t>(2 * out - 1, 0) : out);
  }
}

template <class T>
void run_stem(const StemParams& p) {
  const int64_t channels = 4 * p.in_channels, stride = channels * PANEL;
  const TransformedWeights weights{p.weights, stride,        stride * Stem34::A * Stem34::A, channels, p.out_channels,
                                   p.bias,    p.nonlinearity};
  // Four units a thread, but of seven lines and more where that leaves no thread without one: at every seam lines are computed
  // twice.
  const auto each = [&](int64_t units) {
    return (units + p.batch - 1) / p.batch;
  };
  const int64_t parts = std::min(p.out_height(), std::clamp(each(4 * thread_count()), each(thread_count()),
                                                            std::max(each(thread_count()), p.out_height() / 7)));
  parallel_units(p.batch * parts, [&](int64_t unit, int64_t) {
    const int64_t part = unit % parts;
    stem_rows<T>(p, weights, unit / parts, p.out_height() * part / parts, p.out_height() * (part + 1) / parts);
  });
}

inline void stem(const StemParams& p) {
  with_element(p.dtype, [&](auto t) { run_stem<decltype(t)>(p); });
}

}  // namespace resnet_fused::cpu::RF_ISA
