// What the direct kernels sum over where activations are bfloat16: pairs of channels, which vdpbf16ps multiplies and adds at once.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

using Activation = Bf16;
using Unit = float;
constexpr int64_t CHANNELS_PER_UNIT = 2;

// acc += a.even * b.even + a.odd * b.odd
RF_INLINE vec multiply_add(vec a, vec b, vec acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// Channels [channel, channel + lanes) of one step: of two pixels side by side, which `rows` points at.
RF_INLINE vec load_step(const Bf16* const* rows, int64_t channel, int lanes) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(lanes), rows[0] + channel));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(load(rows[1] + channel, lanes))));
}

// Two pixels' channels side by side as vdpbf16ps takes them, in the order that interleaving leaves: within each eight
// channels, four in `low` and four in `high`.
RF_INLINE void load_panel(const Bf16* const* rows, int64_t channel, int64_t lanes, vec& low, vec& high) {
  const __mmask32 mask = lanes >= PANEL ? ~__mmask32{0} : (__mmask32{1} << lanes) - 1u;
  const __m512i first = _mm512_maskz_loadu_epi16(mask, rows[0] + channel);
  const __m512i second = _mm512_maskz_loadu_epi16(mask, rows[1] + channel);
  low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(first, second));
  high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(first, second));
}
// Back to the channels' own order.
RF_INLINE void order_panel(vec& low, vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const vec unordered = low;
  low = _mm512_permutex2var_ps(unordered, first, high);
  high = _mm512_permutex2var_ps(unordered, second, high);
}

}  // namespace resnet_fused::cpu::RF_ISA
