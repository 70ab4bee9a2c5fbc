// The mean over the pixels of each channel. A thread sums rows of pixels that follow each other, which are those that it wrote in
// the layer before, as far as images and channels alone don't keep all threads busy.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Vectors of channels that go over the pixels together: neighbouring cache lines, and enough sums to hide the adds' latency.
constexpr int POOLED_VECTORS = 8;
// Fewer values than this aren't worth the start of another thread.
constexpr int64_t POOLED_ALONE = 16384;

// sum[v] = vector v of the sum over rows [begin, end) of an image's pixels; x points at the first of `rest` channels.
template <class Element>
RF_INLINE void sum_rows(const AveragePoolParams& p, const Element* x, int64_t rest, int64_t begin, int64_t end,
                        vec (&sum)[POOLED_VECTORS]) {
  const auto lanes = [&](int v) {
    return static_cast<int>(std::clamp<int64_t>(rest - v * LANES, 0, LANES));
  };
  const bool whole = rest >= POOLED_VECTORS * LANES;
  for (vec& s : sum) s = zero();
  x += begin * p.width * p.channels;
  for (int64_t h = begin; h < end; ++h) {
    // Row by row, since sums of sums round less than one long sum.
    vec row[POOLED_VECTORS];
    for (vec& r : row) r = zero();
    for (int64_t w = 0; w < p.width; ++w, x += p.channels) {
      RF_UNROLL(8)
      for (int v = 0; v < POOLED_VECTORS; ++v) {
        row[v] = add(row[v], whole ? load(x + v * LANES) : lanes(v) > 0 ? load(x + v * LANES, lanes(v)) : zero());
      }
    }
    RF_UNROLL(8)
    for (int v = 0; v < POOLED_VECTORS; ++v) sum[v] = add(sum[v], row[v]);
  }
}

template <class Element>
void average_pool(const AveragePoolParams& p) {
  constexpr int64_t CHANNELS = POOLED_VECTORS * LANES;
  const int64_t groups = (p.channels + CHANNELS - 1) / CHANNELS, padded = groups * CHANNELS;
  const int64_t values = p.batch * p.height * p.width * p.channels;
  const int64_t parts = p.batch >= thread_count() || values <= POOLED_ALONE ? 1 : std::min(thread_count(), p.height);
  Scratch scratch;
  float* sums = scratch.take<float>(parts * p.batch * padded);
  parallel_units(values <= POOLED_ALONE ? 1 : parts * p.batch, [&](int64_t unit, int64_t) {
    // One unit has all images where there are few values.
    const int64_t images = values <= POOLED_ALONE ? p.batch : 1;
    for (int64_t i = unit * images; i < (unit + 1) * images; ++i) {
      const int64_t part = i % parts, n = i / parts;
      const Element* x = static_cast<const Element*>(p.x) + n * p.height * p.width * p.channels;
      for (int64_t first = 0; first < p.channels; first += CHANNELS) {
        vec sum[POOLED_VECTORS];
        sum_rows(p, x + first, p.channels - first, p.height * part / parts, p.height * (part + 1) / parts, sum);
        for (int v = 0; v < POOLED_VECTORS; ++v) store(sums + i * padded + first + v * LANES, sum[v]);
      }
    }
  });
  const vec share = splat(1.0f / static_cast<float>(p.height * p.width));
  for (int64_t n = 0; n < p.batch; ++n) {
    const float* own = sums + n * parts * padded;
    Element* y = static_cast<Element*>(p.y) + n * p.channels;
    for (int64_t c = 0; c < p.channels; c += LANES) {
      vec sum = load(own + c);
      for (int64_t part = 1; part < parts; ++part) sum = add(sum, load(own + part * padded + c));
      const int lanes = static_cast<int>(std::min<int64_t>(p.channels - c, LANES));
      store(y + c, mul(sum, share), lanes);
    }
  }
}

inline void average_pool(const AveragePoolParams& p) {
  with_element(p.dtype, [&](auto t) { average_pool<decltype(t)>(p); });
}

}  // namespace resnet_fused::cpu::RF_ISA
