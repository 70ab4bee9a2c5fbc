// Packed weights: [panel of PANEL output channels][kernel position][input channel][PANEL], the order in which the register
// tile reads them. One layout serves the direct kernels and, transformed on the fly, Winograd; it is as large as the plain
// weights (but for the zeros that fill the last panel). The direct kernels of bfloat16 take pairs of input channels side by
// side, as vdpbf16ps does: [panel][kernel position][channel pair][PANEL][2].
//
// They are packed from channels_last weights, [out_channel][kernel position][in_channel]; or turned round for the gradient of
// x, channels in each other's place and kernel positions in an order of their own. Training packs at every step.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// Input channel c of a panel.
RF_INLINE void put_line(const float* line, float* out) {
  store(out, load(line));
  store(out + LANES, load(line + LANES));
}
RF_INLINE void put_line(const float* line, Bf16* out) {
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

  template <class To>
  RF_INLINE void write(To* out, int64_t count, bool pairs) const {
    if constexpr (sizeof(To) < sizeof(float)) {
      if (pairs) {
        for (int64_t k = 0; k < count; k += 2) put_pair(lines[k], lines[k + 1], out + k * PANEL);
        return;
      }
    }
    for (int64_t k = 0; k < count; ++k) put_line(lines[k], out + k * PANEL);
  }
};

template <class From, class To>
void pack_plain(const PackParams& p) {
  const int64_t row = p.taps * p.in_channels;
  parallel_units(panel_count(p.out_channels) * p.taps, [&](int64_t unit, int64_t) {
    const int64_t tap = unit % p.taps, first = unit / p.taps * PANEL;
    const From* from = static_cast<const From*>(p.weights) + first * row + tap * p.in_channels;
    To* out = static_cast<To*>(p.packed) + unit * p.in_channels * PANEL;
    PackBlock block;
    for (int64_t c = 0; c < p.in_channels; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, p.in_channels - c);
      block.read(from + c, row, std::min<int64_t>(PANEL, p.out_channels - first), count);
      block.write(out + c * PANEL, count, p.pairs);
    }
  });
}

template <class From, class To>
void pack_turned(const PackParams& p) {
  const int64_t row = p.taps * p.in_channels;
  // A few filters at a time: their pages are few.
  parallel_units((p.out_channels + LANES - 1) / LANES, [&](int64_t unit, int64_t) {
    const int64_t c = unit * LANES, count = std::min<int64_t>(LANES, p.out_channels - c);
    const From* from = static_cast<const From*>(p.weights) + c * row;
    PackBlock block;
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      for (int64_t i = 0; i < p.in_channels; i += PANEL) {
        block.read_turned(from + p.order[tap] * p.in_channels + i, row, p.in_channels - i, count);
        block.write(static_cast<To*>(p.packed) + (i * p.taps + tap * PANEL) * p.out_channels + c * PANEL, count, p.pairs);
      }
    }
  });
}

template <class From, class To>
void pack_as(const PackParams& p) {
  p.order != nullptr ? pack_turned<From, To>(p) : pack_plain<From, To>(p);
}

inline void pack(const PackParams& p) {
  if (!p.to_bfloat16) {
    pack_as<float, float>(p);
  } else if (p.from_bfloat16) {
    pack_as<Bf16, Bf16>(p);
  } else {
    pack_as<float, Bf16>(p);
  }
}

}  // namespace resnet_fused::cpu::RF_ISA
