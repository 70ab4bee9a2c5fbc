// Packed weights: panels of PANEL output channels, each in the order in which it is read, as large as the plain weights (but
// for the zeros that fill the last panel).
//
//   direct, float32   [panel][kernel position][input channel][PANEL]
//   direct, bfloat16  [panel][kernel position][channel pair][PANEL][2]: what vdpbf16ps takes lies side by side; in float32 where a
//                     CPU hasn't that instruction
//   direct, float16   as direct, float32
//   Winograd          [panel][input channel][kernel position][PANEL]: a transform takes all positions of a channel
//
// They are packed from channels_last weights, [out_channel][kernel position][in_channel]; or turned round for the gradient of
// x, channels in each other's place and kernel positions in an order of their own. Training packs at every step.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Input channel c of a panel.
template <class To>
RF_INLINE void put_line(const float* line, To* out) {
  store(out, load(line));
  store(out + LANES, load(line + LANES));
}

// Input channels c and c + 1 of a panel, side by side.
RF_INLINE void put_pair(const float* first, const float* second, Bf16* out) {
  Bf16 lines[2][PANEL];
  put_line(first, lines[0]);
  put_line(second, lines[1]);
  for (int i = 0; i < PANEL; ++i) {
    out[2 * i] = lines[0][i];
    out[2 * i + 1] = lines[1][i];
  }
}

// Where `count` input channels of a panel and a kernel position, LANES at most, wait to be put: [channel][PANEL].
struct PackBlock {
  alignas(64) float lines[LANES][PANEL];

  // From rows of as many filters, in which they lie side by side.
  template <class From>
  RF_INLINE void read(const From* from, int64_t row, int64_t filters, int64_t count) {
    alignas(64) float rows[PANEL][LANES];
    for (int64_t o = 0; o < PANEL; ++o, from += row) {
      store(rows[o], o >= filters ? zero() : count >= LANES ? load(from) : load(from, static_cast<int>(count)));
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t o = 0; o < PANEL; ++o) lines[k][o] = rows[o][k];
    }
  }

  // From the rows of as many filters, turned round: the panel's `width` channels lie side by side.
  template <class From>
  RF_INLINE void read_turned(const From* from, int64_t row, int64_t width, int64_t count) {
    for (int64_t k = 0; k < count; ++k, from += row) {
      for (int64_t i = 0; i < PANEL; i += LANES) {
        const int64_t lanes = width - i;
        store(lines[k] + i, lanes >= LANES ? load(from + i) : lanes > 0 ? load(from + i, static_cast<int>(lanes)) : zero());
      }
    }
  }
};

// Where a block goes, by the input channel and kernel position it begins with. `channels` are summed over.
template <class To>
struct PackedPanels {
  To* data;
  int64_t panel_stride, tap_stride, channel_stride;
  bool pairs;

  PackedPanels(const PackParams& p, int64_t channels)
      : data(static_cast<To*>(p.packed)),
        panel_stride(p.taps * channels * PANEL),
        tap_stride(p.winograd ? PANEL : channels * PANEL),
        channel_stride(p.winograd ? p.taps * PANEL : PANEL),
        pairs(!p.winograd) {}

  RF_INLINE void put(const PackBlock& block, int64_t panel, int64_t tap, int64_t channel, int64_t count) const {
    To* out = data + panel * panel_stride + tap * tap_stride + channel * channel_stride;
    if constexpr (std::is_same_v<To, Bf16>) {
      if (pairs) {
        for (int64_t k = 0; k < count; k += 2) put_pair(block.lines[k], block.lines[k + 1], out + k * PANEL);
        return;
      }
    }
    for (int64_t k = 0; k < count; ++k) put_line(block.lines[k], out + k * channel_stride);
  }
};

template <class From, class To>
void pack_plain(const PackParams& p) {
  const PackedPanels<To> packed(p, p.in_channels);
  const int64_t row = p.taps * p.in_channels;
  parallel_units(panel_count(p.out_channels) * p.taps, [&](int64_t unit, int64_t) {
    const int64_t tap = unit % p.taps, panel = unit / p.taps, first = panel * PANEL;
    const From* from = static_cast<const From*>(p.weights) + first * row + tap * p.in_channels;
    PackBlock block;
    for (int64_t c = 0; c < p.in_channels; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, p.in_channels - c);
      block.read(from + c, row, std::min<int64_t>(PANEL, p.out_channels - first), count);
      packed.put(block, panel, tap, c, count);
    }
  });
}

template <class From, class To>
void pack_turned(const PackParams& p) {
  const PackedPanels<To> packed(p, p.out_channels);
  const int64_t row = p.taps * p.in_channels;
  // A few filters at a time: their pages are few.
  parallel_units((p.out_channels + LANES - 1) / LANES, [&](int64_t unit, int64_t) {
    const int64_t c = unit * LANES, count = std::min<int64_t>(LANES, p.out_channels - c);
    const From* from = static_cast<const From*>(p.weights) + c * row;
    PackBlock block;
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      for (int64_t i = 0; i < p.in_channels; i += PANEL) {
        block.read_turned(from + p.order[tap] * p.in_channels + i, row, p.in_channels - i, count);
        packed.put(block, i / PANEL, tap, c, count);
      }
    }
  });
}

template <class From, class To>
void pack_as(const PackParams& p) {
  p.order != nullptr ? pack_turned<From, To>(p) : pack_plain<From, To>(p);
}

inline void pack(const PackParams& p) {
  if (p.destination == DType::float32) {
    with_element(p.source, [&](auto from) { pack_as<decltype(from), float>(p); });
  } else if (p.destination == DType::float16) {
    pack_as<F16, F16>(p);
  } else if (p.source == DType::bfloat16) {
    pack_as<Bf16, Bf16>(p);
  } else {
    pack_as<float, Bf16>(p);
  }
}

}  // namespace resnet_fused::cpu::RF_ISA
