// Which tiles Winograd can't be trusted with. A tile sums over all its pixels what a convolution sums over its window, and what
// lies outside of a window cancels in its result: but for a rounding error that is relative to the tile's largest value (at most
// 5e-7 of it, see docs/cpu-kernels.md), and but for NaN and Inf, which don't cancel. So a tile that holds NaN, Inf or a sentinel
// such as 1e10 spoils results that have nothing to do with it.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// A tile's largest value may be this large, or this many times the largest in any one window of it: the error is then within about
// 1e-4 of 1, or of that. Relative to the window, since there are networks whose values are large everywhere, and whose errors are no
// larger for it. Images of 0 to 255 may have black borders.
constexpr float UNEVEN = 256.0f;
// Values above would overflow in the transforms, or in sums of many, where the direct sum doesn't: 2^96.
constexpr float NEAR_OVERFLOW = 0x1p96f;

// Whether a tile of a phase, of which some value is above UNEVEN, is one of those. `pixels` outside the image are `zeros`.
template <class F, class T>
__attribute__((noinline)) bool uneven_tile(const T* const (&pixels)[F::A][F::A], int64_t channels, const T* zeros, int phase) {
  constexpr int A = F::A, M = F::M, WINDOW = A - M + 1, GROUPS = F::GROUPS;
  const int64_t of_group = channels / GROUPS;
  float largest[GROUPS][A][A], largest_of_all = 0.0f;
  for (int group = 0; group < GROUPS; ++group) {
    for (int i = 0; i < A; ++i) {
      for (int j = 0; j < A; ++j) {
        const T* pixel = pixels[i][j] + group * of_group;
        vec highest = zero();
        for (int64_t c = 0; c < of_group; c += LANES) {
          const int64_t lanes = of_group - c;
          const vec x = lanes >= LANES ? load(pixel + c) : load(pixel + c, static_cast<int>(lanes));
          highest = larger(highest, magnitude(x));
        }
        if (any_above(highest, NEAR_OVERFLOW)) return true;
        float of_lanes[LANES];
        store(of_lanes, highest);
        float& here = largest[group][i][j];
        here = of_lanes[0];
        for (const float lane : of_lanes) here = std::max(here, lane);
        largest_of_all = std::max(largest_of_all, here);
      }
    }
  }
  for (int top = 0; top < M; ++top) {
    for (int left = 0; left < M; ++left) {
      float of_window = 1.0f;
      bool inside = false;  // the image; no result lies where no pixel does
      for (int row = 0; row < WINDOW; ++row) {
        for (int column = 0; column < WINDOW; ++column) {
          for (int group = 0; group < GROUPS; ++group) {
            if (!F::has_tap(phase, group, row, column)) continue;
            of_window = std::max(of_window, largest[group][top + row][left + column]);
            inside = inside || pixels[top + row][left + column] != zeros;
          }
        }
      }
      if (inside && largest_of_all > UNEVEN * of_window) return true;
    }
  }
  return false;
}

}  // namespace resnet_fused::cpu::RF_ISA
