// Reductions of batch norm over all values of a channel: statistics, and sums of the gradient.
//
// Every unit of work writes its own partial result, and the partial results are added in double precision in a fixed order:
// the result doesn't depend on the number of threads, nor on which of them took which unit.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "batch_norm_sweep.h"

namespace resnet_fused::cpu::RF_ISA {

// Partial results of two sums per channel, over blocks of rows.
struct RowBlocks {
  explicit RowBlocks(const BatchNormShape& s)
      : shape(s),
        // Few rows still make enough blocks for several threads; many make blocks whose sums are small beside them.
        height(std::min<int64_t>(64, std::max<int64_t>(16, s.per_channel() / 32))),
        down((s.per_channel() + height - 1) / height),
        // Few channels make small blocks; several of them are a unit.
        per_unit(std::max<int64_t>(1, UNIT_ELEMENTS / (height * s.channels))) {}

  int64_t rows_of(int64_t block) const { return std::min(height, shape.per_channel() - block * height); }
  int64_t partial_floats() const { return down * 2 * shape.channels; }

  // Runs body(block, offset of its first row, rows) for every block.
  template <class Body>
  void for_blocks(const Body& body) const {
    parallel_units((down + per_unit - 1) / per_unit, [&](int64_t unit, int64_t) {
      for (int64_t block = unit * per_unit; block < std::min(down, (unit + 1) * per_unit); ++block) {
        body(block, block * height * shape.channels, rows_of(block));
      }
    });
  }

  // Runs body(first channel, channels) over all channels, for adding up the partial results.
  template <class Body>
  void for_channels(const Body& body) const {
    const int64_t step = down * shape.channels > UNIT_ELEMENTS ? 64 : shape.channels;
    parallel_units((shape.channels + step - 1) / step,
                   [&](int64_t unit, int64_t) { body(unit * step, std::min(step, shape.channels - unit * step)); });
  }

  BatchNormShape shape;
  int64_t height, down, per_unit;
};

// Runs body(kind, first row's offset, channel, lanes, rows as a constant) over a block in the order of memory: bands of four
// rows, vector by vector. Walking down single columns instead was measured to halve the bandwidth from memory.
constexpr int BAND = 4;

template <class Body>
RF_INLINE void for_bands(int64_t rows, int64_t channels, const Body& body) {
  int64_t row = 0;
  for (; row + BAND <= rows; row += BAND) {
    for_vectors(channels, [&](auto kind, int64_t c, int lanes) {
      body(kind, row * channels + c, c, lanes, std::integral_constant<int, BAND>{});
    });
  }
  for (; row < rows; ++row) {
    for_vectors(channels, [&](auto kind, int64_t c, int lanes) {
      body(kind, row * channels + c, c, lanes, std::integral_constant<int, 1>{});
    });
  }
}

RF_INLINE void fill_zero(float* p, int64_t count) {
  for_vectors(count, [&](auto kind, int64_t i, int lanes) { put(kind, p + i, zero(), lanes); });
}

// Mean of x - shift and sum of its squared deviations over `rows` rows, in two sweeps; the second reads from the cache.
// `shift` is any row of x: sums of values around it don't lose the digits that sums of large values would.
template <class T>
RF_INLINE void statistics_of_block(const T* x, const T* shift, int64_t rows, int64_t channels, float* mean, float* deviations) {
  fill_zero(mean, channels);
  fill_zero(deviations, channels);
  for_bands(rows, channels, [&](auto kind, int64_t i, int64_t c, int lanes, auto band) {
    const vec origin = get(kind, shift + c, lanes);
    vec sum = sub(get(kind, x + i, lanes), origin);
    for (int r = 1; r < band; ++r) sum = add(sum, sub(get(kind, x + i + r * channels, lanes), origin));
    put(kind, mean + c, add(get(kind, mean + c, lanes), sum), lanes);
  });
  const vec scale = splat(1.0f / static_cast<float>(rows));
  for_vectors(channels,
              [&](auto kind, int64_t c, int lanes) { put(kind, mean + c, mul(get(kind, mean + c, lanes), scale), lanes); });
  for_bands(rows, channels, [&](auto kind, int64_t i, int64_t c, int lanes, auto band) {
    const vec origin = get(kind, shift + c, lanes), center = get(kind, mean + c, lanes);
    vec sum = get(kind, deviations + c, lanes);
    for (int r = 0; r < band; ++r) {
      const vec away = sub(sub(get(kind, x + i + r * channels, lanes), origin), center);
      sum = fma(away, away, sum);
    }
    put(kind, deviations + c, sum, lanes);
  });
}

template <class T>
void statistics_in_rows(const BatchNormShape& s, const T* x, float* mean, float* var) {
  const RowBlocks blocks(s);
  Scratch scratch;
  float* partial = scratch.take<float>(blocks.partial_floats());
  float* shift = scratch.take<float>(s.channels);
  for_vectors(s.channels, [&](auto kind, int64_t c, int lanes) { put(kind, shift + c, get(kind, x + c, lanes), lanes); });
  blocks.for_blocks([&](int64_t block, int64_t begin, int64_t rows) {
    float* out = partial + block * 2 * s.channels;
    statistics_of_block(x + begin, x, rows, s.channels, out, out + s.channels);
  });
  // Chan's formula for many parts at once: the mean of the means, then the deviations of the means around it.
  const double total = static_cast<double>(s.per_channel());
  blocks.for_channels([&](int64_t channel, int64_t channels) {
    Scratch own;
    double* center = own.take<double>(channels);
    double* deviations = own.take<double>(channels);
    for (int64_t c = 0; c < channels; ++c) center[c] = deviations[c] = 0;
    for (int64_t block = 0; block < blocks.down; ++block) {
      const float* means = partial + block * 2 * s.channels + channel;
      const double share = static_cast<double>(blocks.rows_of(block)) / total;
      for (int64_t c = 0; c < channels; ++c) center[c] += share * means[c];
    }
    for (int64_t block = 0; block < blocks.down; ++block) {
      const float* means = partial + block * 2 * s.channels + channel;
      const double rows = static_cast<double>(blocks.rows_of(block));
      for (int64_t c = 0; c < channels; ++c) {
        const double away = means[c] - center[c];
        deviations[c] += means[s.channels + c] + rows * away * away;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[channel + c] = static_cast<float>(shift[channel + c] + center[c]);
      var[channel + c] = static_cast<float>(deviations[c] / total);
    }
  });
}

template <class T>
void statistics_in_planes(const BatchNormShape& s, const T* x, float* mean, float* var) {
  parallel_units(s.channels, [&](int64_t channel, int64_t) {
    const float first = widen(x[channel * s.pixels]);
    const vec origin = splat(first);
    double count = 0, center = 0, deviations = 0;
    for (int64_t image = 0; image < s.images; ++image) {
      const T* plane = x + (image * s.channels + channel) * s.pixels;
      for (int64_t begin = 0; begin < s.pixels; begin += UNIT_ELEMENTS / 4) {
        const int64_t length = std::min(UNIT_ELEMENTS / 4, s.pixels - begin);
        const T* run = plane + begin;
        vec sum = zero(), squares = zero();
        for_vectors(length, [&](auto kind, int64_t i, int lanes) {
          sum = add(sum, first_lanes(kind, sub(get(kind, run + i, lanes), origin), lanes));
        });
        const float own = horizontal_sum(sum) / static_cast<float>(length);
        const vec own_center = splat(own);
        for_vectors(length, [&](auto kind, int64_t i, int lanes) {
          const vec away = first_lanes(kind, sub(sub(get(kind, run + i, lanes), origin), own_center), lanes);
          squares = fma(away, away, squares);
        });
        const double more = static_cast<double>(length), away = own - center, together = count + more;
        center += away * more / together;
        deviations += horizontal_sum(squares) + away * away * count * more / together;
        count = together;
      }
    }
    mean[channel] = static_cast<float>(first + center);
    var[channel] = static_cast<float>(deviations / count);
  });
}

// The gradient of the result, through ReLU's mask where there is one.
template <class T, bool RELU>
struct Gradient {
  const T* dy;
  const T* y;
  template <class Kind>
  RF_INLINE vec operator()(Kind kind, int64_t i, int lanes) const {
    const vec g = get(kind, dy + i, lanes);
    return RELU ? through_relu(get(kind, y + i, lanes), g) : g;
  }
};

// Sums of g and of g (x - mean); the second is divided by the deviation at the end.
template <class T, bool RELU, bool MASKED>
void gradient_sums(const BatchNormShape& s, const BatchNormTensors& t, T* masked, float* dweight, float* dbias) {
  const Gradient<T, RELU> gradient{static_cast<const T*>(t.dy), static_cast<const T*>(t.y)};
  const T* x = static_cast<const T*>(t.x);
  const auto deviation = [&](int64_t c) {
    return std::sqrt(static_cast<double>(t.var[c]) + t.eps);
  };
  if (!s.rows) {
    parallel_units(s.channels, [&](int64_t channel, int64_t) {
      const vec center = splat(t.mean[channel]);
      double total = 0, weighted = 0;
      for (int64_t image = 0; image < s.images; ++image) {
        const int64_t begin = (image * s.channels + channel) * s.pixels;
        vec sum = zero(), products = zero();
        for_vectors(s.pixels, [&](auto kind, int64_t i, int lanes) {
          const vec g = gradient(kind, begin + i, lanes);
          if (MASKED) put(kind, masked + begin + i, g, lanes);
          sum = add(sum, g);
          products = fma(g, sub(get(kind, x + begin + i, lanes), center), products);
        });
        total += horizontal_sum(sum);
        weighted += horizontal_sum(products);
      }
      dbias[channel] = static_cast<float>(total);
      dweight[channel] = static_cast<float>(weighted / deviation(channel));
    });
    return;
  }
  const RowBlocks blocks(s);
  Scratch scratch;
  float* partial = scratch.take<float>(blocks.partial_floats());
  blocks.for_blocks([&](int64_t block, int64_t begin, int64_t rows) {
    float* sums = partial + block * 2 * s.channels;
    fill_zero(sums, 2 * s.channels);
    // Row by row, with the sums in L1: with three or four activations, more rows at once are more streams than the
    // prefetcher of memory follows.
    for (int64_t row = 0; row < rows; ++row) {
      for_vectors(s.channels, [&](auto kind, int64_t c, int lanes) {
        const int64_t i = begin + row * s.channels + c;
        const vec g = gradient(kind, i, lanes), away = sub(get(kind, x + i, lanes), get(kind, t.mean + c, lanes));
        if (MASKED) put(kind, masked + i, g, lanes);
        put(kind, sums + c, add(get(kind, sums + c, lanes), g), lanes);
        float* products = sums + s.channels + c;
        put(kind, products, fma(g, away, get(kind, products, lanes)), lanes);
      });
    }
  });
  blocks.for_channels([&](int64_t channel, int64_t channels) {
    Scratch own;
    double* total = own.take<double>(channels);
    double* weighted = own.take<double>(channels);
    for (int64_t c = 0; c < channels; ++c) total[c] = weighted[c] = 0;
    for (int64_t block = 0; block < blocks.down; ++block) {
      const float* sums = partial + block * 2 * s.channels + channel;
      for (int64_t c = 0; c < channels; ++c) {
        total[c] += sums[c];
        weighted[c] += sums[s.channels + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      dbias[channel + c] = static_cast<float>(total[c]);
      dweight[channel + c] = static_cast<float>(weighted[c] / deviation(channel + c));
    }
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
