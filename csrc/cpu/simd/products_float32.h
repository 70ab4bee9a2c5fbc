// What the direct kernels sum over where activations are float32: one channel at a time.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

using Activation = float;
using Unit = float;
constexpr int64_t CHANNELS_PER_UNIT = 1;

RF_INLINE vec multiply_add(vec a, vec b, vec acc) { return fma(a, b, acc); }

// Channels [channel, channel + lanes) of one step: of the pixel that `rows` points at.
RF_INLINE vec load_step(const float* const* rows, int64_t channel, int lanes) {
  return lanes >= LANES ? load(rows[0] + channel) : load(rows[0] + channel, lanes);
}

// Channels of a panel of which `lanes` exist, of one pixel.
RF_INLINE void load_panel(const float* const* rows, int64_t channel, int64_t lanes, vec& low, vec& high) {
  const float* row = rows[0] + channel;
  low = lanes >= LANES ? load(row) : load(row, static_cast<int>(lanes));
  high = lanes >= PANEL ? load(row + LANES) : lanes > LANES ? load(row + LANES, static_cast<int>(lanes - LANES)) : zero();
}
RF_INLINE void order_panel(vec&, vec&) {}

}  // namespace resnet_fused::cpu::RF_ISA
