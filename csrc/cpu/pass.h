// What follows a convolution but can't stand in its epilogue, in one pass over the activations: a gate, which is made of the whole
// result, or a batch norm that follows a sum or a concatenation.
#pragma once

#include "batch_norm_sweep.h"
#include "nonlinearity.h"

namespace resnet_fused::cpu::RF_ISA {

// Pixels [begin, end) of the batch.
template <class T, bool AFFINE, bool GATE, bool RESIDUAL>
void pass_pixels(const PassParams& p, int64_t begin, int64_t end) {
  // In locals: what is stored may be anything for all that the compiler knows, so that fields would be read again.
  const float *const scales = p.scale, *const shifts = p.shift;
  const PassSource* const sources = p.sources;
  const int64_t channels = p.channels, pixels = p.pixels, source_count = p.source_count;
  const vec floor = floor_of(p.nonlinearity);
  const T* residual = RESIDUAL ? static_cast<const T*>(p.residual) + begin * channels : nullptr;
  T* y = static_cast<T*>(p.y) + begin * channels;
  for (int64_t pixel = begin; pixel < end; ++pixel, y += channels) {
    const T* gate = GATE ? static_cast<const T*>(p.gate) + pixel / pixels * channels : nullptr;
    int64_t first = 0;
    for (int64_t i = 0; i < source_count; ++i) {
      const int64_t own = sources[i].channels;
      const T* x = static_cast<const T*>(sources[i].x) + pixel * own;
      for_vectors(own, [&](auto kind, int64_t offset, int lanes) {
        const int64_t c = first + offset;
        vec a = get(kind, x + offset, lanes);
        if (AFFINE) a = fma(a, get(kind, scales + c, lanes), get(kind, shifts + c, lanes));
        if (GATE) a = mul(AFFINE ? stored<T>(a) : a, get(kind, gate + c, lanes));
        if (RESIDUAL) a = add(AFFINE || GATE ? stored<T>(a) : a, get(kind, residual + c, lanes));
        put(kind, y + c, max_keeping_nan(floor, a), lanes);
      });
      first += own;
    }
    if (RESIDUAL) residual += channels;
    apply_nonlinearity(p.nonlinearity, y, 1, channels, channels);
  }
}

template <class T>
void pass(const PassParams& p) {
  using Pixels = void (*)(const PassParams&, int64_t, int64_t);
  // By whether there is an affine map, a gate, a residual.
  static constexpr Pixels BY_PARTS[2][2][2] = {
      {{pass_pixels<T, false, false, false>, pass_pixels<T, false, false, true>},
       {pass_pixels<T, false, true, false>, pass_pixels<T, false, true, true>}},
      {{pass_pixels<T, true, false, false>, pass_pixels<T, true, false, true>},
       {pass_pixels<T, true, true, false>, pass_pixels<T, true, true, true>}},
  };
  const Pixels run = BY_PARTS[p.scale != nullptr][p.gate != nullptr][p.residual != nullptr];
  const int64_t pixels = p.batch * p.pixels, step = std::max<int64_t>(1, UNIT_ELEMENTS / p.channels);
  parallel_units((pixels + step - 1) / step,
                 [&](int64_t unit, int64_t) { run(p, unit * step, std::min(pixels, (unit + 1) * step)); });
}

inline void pass(const PassParams& p) {
  with_element(p.dtype, [&](auto t) { pass<decltype(t)>(p); });
}

}  // namespace resnet_fused::cpu::RF_ISA
