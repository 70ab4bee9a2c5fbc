// Packed weights: [panel of PANEL output channels][kernel position][input channel][PANEL], the order in which the register
// tile reads them. One layout serves the direct kernels and, transformed on the fly, Winograd; it is as large as the plain
// weights (but for the zeros that fill the last panel). The direct kernels of bfloat16 take pairs of input channels side by
// side, as vdpbf16ps does: [panel][kernel position][channel pair][PANEL][2].
//
// They are packed from channels_last weights, [out_channel][kernel position][in_channel]; or turned round, channels in each
// other's place and kernel positions in reverse, for the convolution that gives the gradient of x. Training packs at every step.
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

template <class From, class To>
void pack_as(const PackParams& p) {
  const int64_t results = p.turned ? p.in_channels : p.out_channels, summed = p.turned ? p.out_channels : p.in_channels;
  const int64_t row = p.taps * p.in_channels;
  const From* weights = static_cast<const From*>(p.weights);
  parallel_units(panel_count(results) * p.taps, [&](int64_t unit, int64_t) {
    const int64_t tap = unit % p.taps, first = unit / p.taps * PANEL, width = std::min<int64_t>(PANEL, results - first);
    To* out = static_cast<To*>(p.packed) + unit * summed * PANEL;
    // As many channels at a time as make whole cache lines of what is read.
    alignas(64) float lines[LANES][PANEL];
    alignas(64) float rows[PANEL][LANES];
    for (int64_t c = 0; c < summed; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, summed - c);
      if (p.turned) {
        const From* from = weights + c * row + (p.taps - 1 - tap) * p.in_channels + first;
        for (int64_t k = 0; k < count; ++k, from += row) {
          for (int64_t i = 0; i < PANEL; i += LANES) {
            const int64_t lanes = width - i;
            store(lines[k] + i, lanes >= LANES ? load(from + i) : lanes > 0 ? load(from + i, static_cast<int>(lanes)) : zero());
          }
        }
      } else {
        const From* from = weights + first * row + tap * p.in_channels + c;
        for (int64_t o = 0; o < PANEL; ++o, from += row) {
          store(rows[o], o >= width ? zero() : count >= LANES ? load(from) : load(from, static_cast<int>(count)));
        }
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t o = 0; o < PANEL; ++o) lines[k][o] = rows[o][k];
        }
      }
      if constexpr (sizeof(To) < sizeof(float)) {
        if (p.pairs) {
          for (int64_t k = 0; k < count; k += 2) put_pair(lines[k], lines[k + 1], out + (c + k) * PANEL);
          continue;
        }
      }
      for (int64_t k = 0; k < count; ++k) put_line(lines[k], out + (c + k) * PANEL);
    }
  });
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
