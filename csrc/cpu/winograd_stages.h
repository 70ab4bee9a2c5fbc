// The stages of a Winograd convolution: weights, input, product, output. Drivers that string them together: winograd.h and
// the whole blocks.
#pragma once

#include "simd.h"
#include "tile.h"
#include "uneven.h"
#include "winograd_grid.h"
#include "winograd_transforms.h"

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

// Where a tile reads and writes: strips of one image, the tile's first output pixel, and how many rows and columns of results it
// has where the image doesn't end before.
template <class T>
struct TilePlace {
  Strip<const T> x, residual;  // residual.data may be null
  Strip<T> y;
  int64_t top, left, rows, columns;
};

// Where the pixels lie of the tile whose first one is (top, left) and whose pixels are F::STRIDE apart; outside the image: `zeros`.
template <class F, class T>
RF_INLINE void find_pixels(const Strip<const T>& image, int64_t top, int64_t left, const T* zeros,
                           const T* (&pixels)[F::A][F::A]) {
  for (int i = 0; i < F::A; ++i) {
    const int64_t h = top + i * F::STRIDE;
    for (int j = 0; j < F::A; ++j) {
      const int64_t w = left + j * F::STRIDE;
      pixels[i][j] = h >= 0 && h < image.height && w >= 0 && w < image.width ? image.pixel(h, w) : zeros;
    }
  }
}

// V = B^T d B of such a tile for all channels; `zeros` has one for each. Returns the largest magnitude in the watched rows of
// B^T d, lane by lane, and in `highest`.
template <class F, class T>
vec transform_input_tile(const Strip<const T>& image, int64_t top, int64_t left, const T* zeros, float* v,
                         int64_t v_point_stride, int64_t v_vector_stride, vec highest) {
  constexpr int A = F::A;
  const T* pixels[A][A];
  find_pixels<F>(image, top, left, zeros, pixels);
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
      for (int i = 0; i < A; ++i) {
        half[i][j] = transformed[i];
        if (F::watched(i)) highest = larger(highest, magnitude(transformed[i]));
      }
    }
    RF_UNROLL(8)
    for (int i = 0; i < A; ++i) {
      vec transformed[A];
      F::input(half[i], transformed);
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) store(v + (i * A + j) * v_point_stride, transformed[j]);
    }
  }
  return highest;
}

// Runs visit(top, left, phase) for the first pixel of each phase of a tile.
template <class F, class T, class Visit>
RF_INLINE void for_each_phase_of(const TilePlace<T>& tile, Visit&& visit) {
  for (int phase = 0; phase < F::PHASES; ++phase) {
    visit(F::first_row(tile.top, F::PAD, phase), F::first_column(tile.left, F::PAD, phase), phase);
  }
}

// V of the tiles t at place(t), [point][phase][vector][tile][LANES]; a phase has `vectors` vectors of channels. Returns whether
// Winograd can be trusted with all of them (uneven.h).
template <class F, class T, class Place>
bool transform_input(int64_t tiles, Place&& place, const T* zeros, float* v, int64_t v_point_stride, int64_t vectors,
                     int64_t v_vector_stride) {
  vec highest = zero();
  for (int64_t t = 0; t < tiles; ++t) {
    const TilePlace<T> tile = place(t);
    for_each_phase_of<F>(tile, [&](int64_t top, int64_t left, int phase) {
      highest = transform_input_tile<F, T>(tile.x, top, left, zeros, v + t * LANES + phase * vectors * v_vector_stride,
                                           v_point_stride, v_vector_stride, highest);
    });
  }
  if (!any_above(highest, UNEVEN)) return true;
  bool uneven = false;
  for (int64_t t = 0; t < tiles && !uneven; ++t) {
    const TilePlace<T> tile = place(t);
    for_each_phase_of<F>(tile, [&](int64_t top, int64_t left, int phase) {
      const T* pixels[F::A][F::A];
      find_pixels<F>(tile.x, top, left, zeros, pixels);
      uneven |= uneven_tile<F, T>(pixels, tile.x.channels, zeros, phase);
    });
  }
  return !uneven;
}

// Elements of a layer's packed weights for one panel and input channel.
constexpr int64_t CHANNEL_TAPS = 9 * PANEL;

// Row ROW of the points of U = G g G^T, for `channels` input channels of one panel and one phase. Taps lie [channel][9][PANEL];
// U [point of the row][channel][PANEL].
template <class F, int PHASE, int ROW, class W>
void transform_phase_row(const W* packed, int64_t channels, float* u, int64_t u_point_stride) {
  constexpr int A = F::A, TAPS = F::TAPS;
  for (int64_t c = 0; c < channels; ++c, packed += CHANNEL_TAPS) {
    for (const W* taps = packed; taps < packed + PANEL; taps += LANES, u += LANES) {
      vec line[TAPS], transformed[A];
      RF_UNROLL(3)
      for (int j = 0; j < TAPS; ++j) {
        vec column[TAPS], points[A];
        RF_UNROLL(3)
        for (int i = 0; i < TAPS; ++i) {
          const int row = F::kernel_row(PHASE, i), kernel_column = F::kernel_column(PHASE, j);
          column[i] = row < 0 || kernel_column < 0 ? zero() : load(taps + (3 * row + kernel_column) * PANEL);
        }
        F::weight(column, points);
        line[j] = points[ROW];
      }
      F::weight(line, transformed);
      RF_UNROLL(8)
      for (int j = 0; j < A; ++j) store(u + j * u_point_stride, transformed[j]);
    }
  }
}

// The same for all phases: [point of the row][phase][u_phase_stride].
template <class F, int ROW, class W>
void transform_row(const W* packed, int64_t channels, float* u, int64_t u_point_stride, int64_t u_phase_stride) {
  const auto phase = [&](auto number) {
    constexpr int PHASE = decltype(number)::value;
    transform_phase_row<F, PHASE, ROW>(packed, channels, u + PHASE * u_phase_stride, u_point_stride);
  };
  phase(std::integral_constant<int, 0>{});
  if constexpr (F::PHASES == 4) {
    phase(std::integral_constant<int, 1>{});
    phase(std::integral_constant<int, 2>{});
    phase(std::integral_constant<int, 3>{});
  }
}

template <class W>
using RowTransform = void (*)(const W* packed, int64_t channels, float* u, int64_t u_point_stride, int64_t u_phase_stride);

template <class F, class W, int... ROW>
constexpr std::array<RowTransform<W>, sizeof...(ROW)> row_transforms(std::integer_sequence<int, ROW...>) {
  return {&transform_row<F, ROW, W>...};
}

// transform_row() of each row of points.
template <class F, class W>
constexpr auto ROW_TRANSFORMS = row_transforms<F, W>(std::make_integer_sequence<int, F::A>{});

// All rows, from packed taps to U [point][phase][u_phase_stride].
template <class F, class W>
void transform_weights(const W* packed, int64_t channels, float* u, int64_t u_point_stride, int64_t u_phase_stride) {
  for (const RowTransform<W> transform : ROW_TRANSFORMS<F, W>) {
    transform(packed, channels, u, u_point_stride, u_phase_stride);
    u += F::A * u_point_stride;
  }
}

// Y = f(A^T M A + bias + residual) of one tile and one vector of output channels. Pixels outside the image are not written.
template <class F, class T>
void transform_output_tile(const float* m, int64_t m_point_stride, const float* bias, const TilePlace<T>& tile, int64_t channel,
                           const Nonlinearity& nonlinearity) {
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
  const vec shift_vector = load(bias + channel);
  const vec floor = floor_of(nonlinearity);
  const Strip<T>& y = tile.y;
  const int64_t rows = std::min(tile.rows, y.height - tile.top), columns = std::min(tile.columns, y.width - tile.left);
  const int64_t lanes = y.channels - channel;
  RF_UNROLL(8)
  for (int i = 0; i < M; ++i) {
    if (i >= rows) break;
    vec transformed[M];
    F::output(half[i], transformed);
    T* out = y.pixel(tile.top + i, tile.left) + channel;
    const T* add_to = tile.residual.data == nullptr ? nullptr : tile.residual.pixel(tile.top + i, tile.left) + channel;
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
    apply_nonlinearity(nonlinearity, out, std::min<int64_t>(columns, M), y.channels, std::min<int64_t>(lanes, LANES));
  }
}

// The same for `count` vectors of channels of a tile, from vector `first` on; those that don't exist are left out.
template <class F, class T>
void transform_output_vectors(const TilePlace<T>& tile, const float* m, int64_t m_point_stride, int64_t m_vector_stride,
                              const float* bias, int64_t first, int64_t count, const Nonlinearity& nonlinearity) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = (first + i) * LANES;
    if (channel >= tile.y.channels) return;
    transform_output_tile<F, T>(m + i * m_vector_stride, m_point_stride, bias, tile, channel, nonlinearity);
  }
}

// The weights of a layer after their transform: [panel][point][phase][channel][PANEL].
struct TransformedWeights {
  const float* u;
  int64_t point_stride, panel_stride;
  int64_t in_channels, out_channels;
  const float* bias;
  Nonlinearity nonlinearity;
};

template <class F>
int64_t transformed_elements(int64_t in_channels, int64_t out_channels) {
  return panel_count(out_channels) * F::A * F::A * point_stride(F::PHASES * in_channels * 2);
}

template <class F>
TransformedWeights transformed_weights(const float* u, const float* bias, int64_t in_channels, int64_t out_channels,
                                       const Nonlinearity& nonlinearity) {
  const int64_t stride = point_stride(F::PHASES * in_channels * 2);
  return {u, stride, stride * F::A * F::A, in_channels, out_channels, bias, nonlinearity};
}

// Transforms all weights of a layer, on all threads.
template <class F, class T>
void transform_layer(const T* packed, int64_t in_channels, int64_t out_channels, float* u) {
  const TransformedWeights layer = transformed_weights<F>(u, nullptr, in_channels, out_channels, NO_NONLINEARITY);
  const int64_t panels = panel_count(out_channels);
  int64_t chunk = 64;  // input channels a unit of work
  while (chunk > 8 && panels * ((in_channels + chunk - 1) / chunk) < thread_count()) chunk /= 2;
  const int64_t chunks = (in_channels + chunk - 1) / chunk;
  parallel_units(panels * chunks, [&](int64_t unit, int64_t) {
    const int64_t panel = unit / chunks, c = unit % chunks * chunk;
    transform_weights<F, T>(packed + (panel * in_channels + c) * CHANNEL_TAPS, std::min(chunk, in_channels - c),
                            u + panel * layer.panel_stride + c * PANEL, layer.point_stride, in_channels * PANEL);
  });
}

// The transformed weights of a layer: those that were kept, or else made in memory taken from `scratch`.
template <class F, class T>
TransformedWeights layer_weights(Scratch& scratch, const LayerParams& layer, const Nonlinearity& nonlinearity) {
  const float* u = static_cast<const float*>(layer.weights);
  if (!layer.transformed) {
    float* made = scratch.take<float>(transformed_elements<F>(layer.in_channels, layer.out_channels));
    transform_layer<F, T>(static_cast<const T*>(layer.weights), layer.in_channels, layer.out_channels, made);
    u = made;
  }
  return transformed_weights<F>(u, layer.bias, layer.in_channels, layer.out_channels, nonlinearity);
}

// Channels summed in one go: sums of sums round less than one long sum. Of the rounding errors of F(4x4) those of the sums are the
// largest. With 128 in one go a layer of 128 channels has 1.7 times the error; with 16 it takes a fifth longer.
constexpr int64_t LONGEST_SUM = 32;

// Takes tiles through input transform, products and output transform, `group` panels at a time. `place(t)` tells where tile t
// lies; `between()` is called before each product, to prefetch what comes later. Returns whether Winograd can be trusted with
// all of them.
template <class F, class T, class Place, class Between>
[[nodiscard]] bool winograd_tiles(const TransformedWeights& w, const TileRuns& runs, int64_t group, Place&& place,
                                  Between&& between) {
  constexpr int POINTS = F::A * F::A;
  const int64_t panels = panel_count(w.out_channels), tiles = runs.count();
  group = std::min(group, panels);
  const int64_t vectors = vector_count(w.in_channels);  // of one phase
  const int64_t v_stride = point_stride(F::PHASES * vectors * tiles), m_stride = point_stride(group * 2 * tiles);
  Scratch scratch;
  float* v = scratch.take<float>(v_stride * POINTS);
  float* m = scratch.take<float>(m_stride * POINTS);
  T* zeros = scratch.take<T>(w.in_channels);
  __builtin_memset(zeros, 0, static_cast<size_t>(w.in_channels) * sizeof(T));

  const bool trusted = transform_input<F, T>(tiles, place, zeros, v, v_stride, vectors, tiles * LANES);
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t count = std::min(group, panels - first);
    for (int point = 0; point < POINTS; ++point) {
      const PhaseRun phases = F::run(point);
      const TileRuns::Run run = runs.at<F>(point);
      const float* a = v + point * v_stride + (phases.first * vectors * tiles + run.first) * LANES;
      const float* b = w.u + first * w.panel_stride + point * w.point_stride + phases.first * w.in_channels * PANEL;
      for (int64_t j = 0; j < count; ++j) {
        between();
        for (int64_t c = 0; c < phases.count * w.in_channels; c += LONGEST_SUM) {
          multiply_rows({a + c * tiles, tiles * LANES, b + j * w.panel_stride + c * PANEL,
                         std::min(LONGEST_SUM, phases.count * w.in_channels - c),
                         m + point * m_stride + (j * 2 * tiles + run.first) * LANES, tiles * LANES, c > 0},
                        run.count);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      transform_output_vectors<F, T>(place(t), m + t * LANES, m_stride, tiles * LANES, w.bias, 2 * first, 2 * count,
                                     w.nonlinearity);
    }
  }
  return trusted;
}

// A run of memory fetched into L2 piece by piece while products keep the multipliers busy.
struct Prefetcher {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t step = 0;

  Prefetcher() = default;
  template <class T>
  Prefetcher(const T* begin, int64_t count, int64_t steps) {
    if (begin == nullptr || count <= 0) return;
    next = reinterpret_cast<const char*>(begin);
    end = reinterpret_cast<const char*>(begin + count);
    step = ((end - next) / 64 + steps) / steps * 64;
  }
  template <bool WRITE>
  RF_INLINE void advance() {
    const char* stop = next + step < end ? next + step : end;
    for (; next < stop; next += 64) WRITE ? prefetch_for_write(next) : prefetch_l2(next);
  }
};

}  // namespace resnet_fused::cpu::RF_ISA
