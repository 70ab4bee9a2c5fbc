// The mean over the pixels of each channel, shared out over channels: in deep layers at batch 1 there is but one image.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Vectors of channels that go over the pixels together: neighbouring cache lines, and enough sums to hide the adds' latency.
constexpr int POOLED_VECTORS = 8;

template <class Element>
void average_pool(const AveragePoolParams& p) {
  const int64_t groups = (p.channels + POOLED_VECTORS * LANES - 1) / (POOLED_VECTORS * LANES);
  const vec share = splat(1.0f / static_cast<float>(p.height * p.width));
  parallel_units(p.batch * groups, [&](int64_t unit, int64_t) {
    const int64_t n = unit / groups, first = unit % groups * POOLED_VECTORS * LANES;
    const Element* x = static_cast<const Element*>(p.x) + n * p.height * p.width * p.channels + first;
    Element* y = static_cast<Element*>(p.y) + n * p.channels + first;
    const int64_t rest = p.channels - first;
    const auto lanes = [&](int v) {
      return static_cast<int>(std::clamp<int64_t>(rest - v * LANES, 0, LANES));
    };
    const bool whole = rest >= POOLED_VECTORS * LANES;
    vec sum[POOLED_VECTORS];
    for (vec& s : sum) s = zero();
    for (int64_t h = 0; h < p.height; ++h) {
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
    for (int v = 0; v < POOLED_VECTORS; ++v) {
      if (lanes(v) > 0) store(y + v * LANES, mul(sum[v], share), lanes(v));
    }
  });
}

inline void average_pool(const AveragePoolParams& p) {
  p.dtype == DType::bfloat16 ? average_pool<Bf16>(p) : average_pool<float>(p);
}

}  // namespace resnet_fused::cpu::RF_ISA
