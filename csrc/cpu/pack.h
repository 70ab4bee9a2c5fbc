// Packed weights: [panel of PANEL output channels][kernel position][input channel][PANEL], the order in which the register
// tile reads them. One layout serves the direct kernels and, transformed on the fly, Winograd; it is as large as the plain
// weights (but for the zeros that fill the last panel).
#pragma once

namespace resnet_fused::cpu::RF_ISA {

template <class T>
void pack_panels(const T* weights, T* packed, int64_t out_channels, int64_t in_channels, int64_t taps) {
  const int64_t panels = panel_count(out_channels);
  parallel_units(panels, [&](int64_t panel, int64_t) {
    T* out = packed + panel * taps * in_channels * PANEL;
    for (int64_t o = 0; o < PANEL; ++o) {
      const int64_t channel = panel * PANEL + o;
      const T* filter = weights + channel * in_channels * taps;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < in_channels; ++c) {
          out[(tap * in_channels + c) * PANEL + o] = channel < out_channels ? filter[c * taps + tap] : T{};
        }
      }
    }
  });
}

// Pairs of bfloat16 channels side by side, as vdpbf16ps takes them: [panel][kernel position][channel pair][PANEL][2].
inline void pack_pairs(const void* weights, void* packed, int64_t out_channels, int64_t in_channels, int64_t taps) {
  const Bf16* from = static_cast<const Bf16*>(weights);
  const int64_t panels = panel_count(out_channels);
  parallel_units(panels, [&](int64_t panel, int64_t) {
    Bf16* out = static_cast<Bf16*>(packed) + panel * taps * in_channels * PANEL;
    for (int64_t o = 0; o < PANEL; ++o) {
      const int64_t channel = panel * PANEL + o;
      const Bf16* filter = from + channel * in_channels * taps;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < in_channels; ++c) {
          out[((tap * in_channels + c - c % 2) * PANEL + 2 * o) + c % 2] = channel < out_channels ? filter[c * taps + tap] : Bf16{};
        }
      }
    }
  });
}

inline void pack(const void* weights, void* packed, int64_t out_channels, int64_t in_channels, int64_t taps, bool bfloat16) {
  if (bfloat16) {
    pack_panels(static_cast<const Bf16*>(weights), static_cast<Bf16*>(packed), out_channels, in_channels, taps);
  } else {
    pack_panels(static_cast<const float*>(weights), static_cast<float*>(packed), out_channels, in_channels, taps);
  }
}

}  // namespace resnet_fused::cpu::RF_ISA
