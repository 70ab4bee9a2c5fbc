// The multiply-add peak of a core, for benchmarks: what share of it a kernel reaches.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Runs `rounds` rounds of multiply-adds that depend on nothing but registers. Returns their number of floating-point
// operations; `sink` keeps the compiler from leaving them out.
inline int64_t multiply_add_loop(int64_t rounds, float* sink) {
  // Enough chains to hide the latency of 4 or 5 cycles on two units.
  constexpr int CHAINS = 12;
  vec sums[CHAINS];
  RF_UNROLL(16)
  for (int i = 0; i < CHAINS; ++i) sums[i] = splat(static_cast<float>(i));
  const vec a = splat(0.5f), b = splat(0.25f);
  for (int64_t round = 0; round < rounds; ++round) {
    RF_UNROLL(16)
    for (int i = 0; i < CHAINS; ++i) sums[i] = multiply_add(a, b, sums[i]);
  }
  vec sum = zero();
  RF_UNROLL(16)
  for (int i = 0; i < CHAINS; ++i) sum = add(sum, sums[i]);
  float lanes[LANES];
  store(lanes, sum);
  *sink += lanes[0];
  return rounds * CHAINS * LANES * 2 * CHANNELS_PER_UNIT;
}

}  // namespace resnet_fused::cpu::RF_ISA
