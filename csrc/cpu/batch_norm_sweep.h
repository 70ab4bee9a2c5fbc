// Sweeps over activations in either layout, and the elementwise pieces of batch norm.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Elements of one unit of work: 64 KiB of float32, so that what a unit reads again is still in L2.
constexpr int64_t UNIT_ELEMENTS = 16384;

// A whole vector, or the first `lanes` of one at the end of a row or plane.
using WholeVector = std::false_type;
using PartOfVector = std::true_type;

template <class T>
RF_INLINE vec get(WholeVector, const T* p, int) {
  return load(p);
}
template <class T>
RF_INLINE vec get(PartOfVector, const T* p, int lanes) {
  return load(p, lanes);
}
template <class T>
RF_INLINE void put(WholeVector, T* p, vec a, int) {
  store(p, a);
}
template <class T>
RF_INLINE void put(PartOfVector, T* p, vec a, int lanes) {
  store(p, a, lanes);
}

// Zero beyond the first `lanes`, where a masked load of x gave (0 - mean).
RF_INLINE vec first_lanes(WholeVector, vec a, int) { return a; }
RF_INLINE vec first_lanes(PartOfVector, vec a, int lanes) { return first_lanes(a, lanes); }

RF_INLINE float horizontal_sum(vec a) {
  alignas(64) float lanes[LANES];
  store(lanes, a);
  // Halves are added pairwise, which rounds less than one after the other.
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Runs body(kind, offset, lanes) for every vector of a run of `length` elements.
template <class Body>
RF_INLINE void for_vectors(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) body(WholeVector{}, i, LANES);
  if (i < length) body(PartOfVector{}, i, static_cast<int>(length - i));
}

// A value per channel for one vector of activations: a vector of them in rows, one of them in planes.
struct InRows {
  template <class Kind>
  static RF_INLINE vec term(Kind kind, const float* values, int64_t channel, int lanes) {
    return get(kind, values + channel, lanes);
  }
};
struct InPlanes {
  template <class Kind>
  static RF_INLINE vec term(Kind, const float* values, int64_t channel, int) {
    return splat(values[channel]);
  }
};

// Runs body(layout, kind, offset, channel, lanes) for every vector of the activations, in parallel; the last units first. The
// reduction before has just read the activations from first to last: their end is still in the cache, and whoever reads the
// result next begins where this ends.
template <class Body>
void for_activations(const BatchNormShape& s, const Body& body) {
  if (s.rows) {
    const int64_t rows = s.per_channel(), step = std::max<int64_t>(1, UNIT_ELEMENTS / s.channels);
    const int64_t units = (rows + step - 1) / step;
    parallel_units(units, [&](int64_t done, int64_t) {
      const int64_t unit = units - 1 - done;
      for (int64_t row = unit * step; row < std::min(rows, (unit + 1) * step); ++row) {
        const int64_t begin = row * s.channels;
        for_vectors(s.channels, [&](auto kind, int64_t c, int lanes) { body(InRows{}, kind, begin + c, c, lanes); });
      }
    });
  } else {
    const int64_t planes = s.images * s.channels, step = std::max<int64_t>(1, UNIT_ELEMENTS / s.pixels);
    const int64_t units = (planes + step - 1) / step;
    parallel_units(units, [&](int64_t done, int64_t) {
      const int64_t unit = units - 1 - done;
      for (int64_t plane = unit * step; plane < std::min(planes, (unit + 1) * step); ++plane) {
        const int64_t begin = plane * s.pixels, channel = plane % s.channels;
        for_vectors(s.pixels, [&](auto kind, int64_t i, int lanes) { body(InPlanes{}, kind, begin + i, channel, lanes); });
      }
    });
  }
}

}  // namespace resnet_fused::cpu::RF_ISA
