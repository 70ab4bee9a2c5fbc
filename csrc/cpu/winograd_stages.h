// The stages of a Winograd convolution: weights, input, product, output. Drivers that string them together: winograd.h and
// the whole blocks.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// Rows of one NHWC image. `data` points at row `first_row`; a tile reads only the rows it needs, so that a strip of the
// image suffices.
template <class T>
struct Strip {
  T* data;
  int64_t first_row;
  int64_t height, width, channels;  // of the whole image

  RF_INLINE T* pixel(int64_t h, int64_t w) const { return data + ((h - first_row) * width + w) * channels; }
};

// Matrices of one stage lie [point][vector of channels][tile][LANES]. The stride between points is an odd number of cache
// lines: the 36 points of a tile then fall into different cache sets.
RF_INLINE int64_t point_stride(int64_t vectors) {
  constexpr int64_t LINE = 64 / sizeof(float);
  return (((vectors * LANES + LINE - 1) / LINE) | 1) * LINE;
}

RF_INLINE int64_t vector_count(int64_t channels) { return (channels + LANES - 1) / LANES; }
RF_INLINE int64_t panel_count(int64_t channels) { return (channels + PANEL - 1) / PANEL; }

// V = B^T d B of the tile whose first input pixel is (top, left), for all channels. Pixels outside the image read `zeros`
// (one per channel).
template <class F, class T>
void transform_input_tile(const Strip<const T>& image, int64_t top, int64_t left, const T* zeros, float* v,
                          int64_t v_point_stride, int64_t v_vector_stride) {
  constexpr int A = F::A;
  const T* pixels[A][A];
  for (int i = 0; i < A; ++i) {
    const bool row_inside = top + i >= 0 && top + i < image.height;
    for (int j = 0; j < A; ++j) {
      const bool inside = row_inside && left + j >= 0 && left + j < image.width;
      pixels[i][j] = inside ? image.pixel(top + i, left + j) : zeros;
    }
  }
  for (int64_t c = 0; c < image.channels; c += LANES, v += v_vector_stride) {
    const int64_t lanes = image.channels - c;
    vec half[A][A];
    RF_UNROLL(8)
    for (int j = 0; j < A; ++j) {
      vec column[A], transformed[A];
      RF_UNROLL(8)
      for (int i = 0; i < A; ++i) {
        column[i] = lanes >= LANES ? load(pixels[i][j] + c) : load(pixels[i][j] + c, static_cast<int>(lanes));
      }
      F::input(column, transformed);
      RF_UNROLL(8)
      for (int i = 0; i < A; ++i) half[i][j] = transformed[i];
    }
    RF_UNROLL(8)
    for (int i = 0; i < A; ++i) {
      vec transformed[A];
      F::input(half[i], transformed);
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) store(v + (i * A + j) * v_point_stride, transformed[j]);
    }
  }
}

// U = G g G^T of `channels` input channels of one panel. The taps lie [9][tap_stride / PANEL][PANEL], U [point][channel][PANEL].
template <class F, class W>
void transform_weights(const W* taps, int64_t tap_stride, int64_t channels, float* u, int64_t u_point_stride) {
  constexpr int A = F::A;
  for (int64_t at = 0; at < channels * PANEL; at += LANES) {
    vec half[A][3];
    RF_UNROLL(3)
    for (int j = 0; j < 3; ++j) {
      const vec column[3] = {load(taps + at + j * tap_stride), load(taps + at + (3 + j) * tap_stride),
                             load(taps + at + (6 + j) * tap_stride)};
      vec transformed[A];
      F::weight(column, transformed);
      RF_UNROLL(8)
      for (int i = 0; i < A; ++i) half[i][j] = transformed[i];
    }
    RF_UNROLL(8)
    for (int i = 0; i < A; ++i) {
      vec transformed[A];
      F::weight(half[i], transformed);
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) store(u + (i * A + j) * u_point_stride + at, transformed[j]);
    }
  }
}

// Y = A^T M A of one tile and one vector of output channels, + shift + residual, ReLU. `residual` (may be null) and `y` are
// strips of the same geometry; (top, left) is the first output pixel; pixels outside the image are not written.
template <class F, class T>
void transform_output_tile(const float* m, int64_t m_point_stride, const float* shift, const Strip<const T>& residual,
                           const Strip<T>& y, int64_t top, int64_t left, int64_t channel, bool relu) {
  constexpr int A = F::A, M = F::M;
  vec half[M][A];
  RF_UNROLL(8)
  for (int j = 0; j < A; ++j) {
    vec column[A], transformed[M];
    RF_UNROLL(8)
    for (int i = 0; i < A; ++i) column[i] = load(m + (i * A + j) * m_point_stride);
    F::output(column, transformed);
    RF_UNROLL(8)
    for (int i = 0; i < M; ++i) half[i][j] = transformed[i];
  }
  const vec shift_vector = load(shift + channel);
  const vec floor = relu ? zero() : splat(-__builtin_inff());
  const int64_t rows = y.height - top, columns = y.width - left, lanes = y.channels - channel;
  RF_UNROLL(8)
  for (int i = 0; i < M; ++i) {
    if (i >= rows) break;
    vec transformed[M];
    F::output(half[i], transformed);
    T* out = y.pixel(top + i, left) + channel;
    const T* add_to = residual.data == nullptr ? nullptr : residual.pixel(top + i, left) + channel;
    RF_UNROLL(8)
    for (int j = 0; j < M; ++j) {
      if (j >= columns) break;
      const int64_t at = j * y.channels;
      const T* residual_at = add_to == nullptr ? nullptr : add_to + at;
      if (lanes >= LANES) {
        finish(add(transformed[j], shift_vector), residual_at, out + at, floor);
      } else {
        finish(add(transformed[j], shift_vector), residual_at, out + at, floor, lanes);
      }
    }
  }
}

}  // namespace resnet_fused::cpu::RF_ISA
