// 3 x 3 convolution of padding 1 by Winograd's minimal filtering, in two orders of work. See docs/cpu-kernels.md.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// Output tiles of a batch, numbered row by row, image by image.
template <class F>
struct TileGrid {
  explicit TileGrid(const ConvParams& p)
      : in_height(p.height),
        height(p.out_height),
        down((p.out_height + F::M - 1) / F::M),
        across((p.out_width + F::M - 1) / F::M),
        count(p.batch * down * across) {}

  RF_INLINE int64_t image(int64_t tile) const { return tile / (down * across); }
  RF_INLINE int64_t top(int64_t tile) const { return tile / across % down * F::M; }
  RF_INLINE int64_t left(int64_t tile) const { return tile % across * F::M; }
  // Row of results `offset` below the top of a tile, counted through the whole batch and held within the tile's image.
  RF_INLINE int64_t batch_row(int64_t tile, int64_t offset) const {
    const int64_t row = top(tile) + offset;
    return image(tile) * height + (row < height ? row : height);
  }
  // The same for the row of x that this row of results begins with.
  RF_INLINE int64_t x_row(int64_t tile, int64_t offset) const {
    const int64_t row = (top(tile) + offset) * F::STRIDE;
    return image(tile) * in_height + (row < in_height ? row : in_height);
  }

  int64_t in_height, height, down, across, count;
};

template <class F, class T>
struct WinogradConv {
  static constexpr int POINTS = F::A * F::A;

  const ConvParams& p;
  const WinogradPlan& plan;
  const TileGrid<F> grid;
  const TransformedWeights kept;             // if p.transformed
  const int64_t panels, in_vectors, blocks;  // blocks of plan.tiles tiles

  WinogradConv(const ConvParams& params, const WinogradPlan& how)
      : p(params),
        plan(how),
        grid(params),
        kept(transformed_weights<F>(static_cast<const float*>(params.weights), params.shift, params.in_channels,
                                    params.out_channels, params.relu)),
        panels(panel_count(params.out_channels)),
        in_vectors(vector_count(params.in_channels)),
        blocks((grid.count + how.tiles - 1) / how.tiles) {}

  RF_INLINE int64_t block_begin(int64_t block) const { return grid.count * block / blocks; }
  RF_INLINE int64_t tap_stride() const { return p.in_channels * PANEL; }
  RF_INLINE const T* panel_taps(int64_t panel) const {
    return static_cast<const T*>(p.weights) + panel * 9 * tap_stride();
  }
  template <class Element>
  RF_INLINE Strip<Element> result(Element* batch, int64_t n) const {
    const int64_t size = p.out_height * p.out_width * p.out_channels;
    return {batch == nullptr ? nullptr : batch + n * size, 0, p.out_height, p.out_width, p.out_channels};
  }

  TilePlace<T> place(int64_t tile) const {
    const int64_t n = grid.image(tile);
    const T* x = static_cast<const T*>(p.x) + n * p.height * p.width * p.in_channels;
    return {{x, 0, p.height, p.width, p.in_channels},
            result(static_cast<const T*>(p.residual), n),
            result(static_cast<T*>(p.y), n),
            grid.top(tile),
            grid.left(tile)};
  }

  // A thread takes a block of tiles through all stages, everything in its L2. Weights that weren't kept transformed are
  // transformed first, once for all threads.
  void by_tiles() const {
    Scratch shared;
    const LayerParams layer{p.weights, p.transformed, p.shift, p.in_channels, p.out_channels};
    const TransformedWeights weights = layer_weights<F, T>(shared, layer, p.relu);
    parallel_units(blocks, [&](int64_t block, int64_t following) {
      const int64_t begin = block_begin(block), tiles = block_begin(block + 1) - begin;
      const int64_t out_begin = grid.batch_row(begin, 0) * p.out_width * p.out_channels;
      const int64_t out_count = grid.batch_row(begin + tiles - 1, F::M) * p.out_width * p.out_channels - out_begin;
      const int64_t first_steps = POINTS * std::min(plan.panels, panels);
      const auto at_output = [&](auto* data) { return data == nullptr ? data : data + out_begin; };
      Prefetcher y(at_output(static_cast<const T*>(p.y)), out_count, first_steps);
      Prefetcher residual(at_output(static_cast<const T*>(p.residual)), out_count, first_steps);
      Prefetcher next_x;
      if (following >= 0) {
        const int64_t first = block_begin(following), last = block_begin(following + 1) - 1;
        const int64_t row = grid.x_row(first, 1), rows = grid.x_row(last, F::M + 1) - row;
        const int64_t width = p.width * p.in_channels;
        next_x = Prefetcher(static_cast<const T*>(p.x) + row * width, rows * width, POINTS * panels);
      }
      winograd_tiles<F, T>(
          weights, tiles, plan.panels, [&](int64_t t) { return place(begin + t); },
          [&] {
            next_x.template advance<false>();
            residual.template advance<false>();
            y.template advance<true>();
          });
    });
  }

  // A thread takes a panel of output channels for a block of tiles, and transforms the panel's weights chunk by chunk, just
  // before their use: for deep layers, whose weights outweigh their pixels. Every thread transforms the tiles for itself: that
  // is faster than reading V from where another core has written it.
  void by_panels() const {
    const int64_t v_stride = point_stride(F::PHASES * in_vectors * plan.tiles);
    parallel_workers(panels * blocks, [&](Units& units) {
      Scratch scratch;
      float* v = scratch.take<float>(v_stride * POINTS);
      T* zeros = scratch.take<T>(p.in_channels);
      __builtin_memset(zeros, 0, static_cast<size_t>(p.in_channels) * sizeof(T));
      for (int64_t held = -1; units.take();) {
        const int64_t block = units.current() / panels, begin = block_begin(block), tiles = block_begin(block + 1) - begin;
        for (int64_t t = 0; block != held && t < tiles; ++t) {
          transform_input_phases<F, T>(place(begin + t), zeros, v + t * LANES, v_stride, in_vectors, tiles * LANES);
        }
        held = block;
        one_panel(units.current() % panels, block, units.following(), v, v_stride);
      }
    });
  }

  // A share of the next chunk's taps, `size` elements each, at every point: memory keeps up with an even flow, not with bursts.
  RF_INLINE void prefetch_taps(const T* taps, int64_t size, int point) const {
    constexpr int SHARES = POINTS / 9;
    const int64_t begin = size * (point % SHARES) / SHARES, end = size * (point % SHARES + 1) / SHARES;
    Prefetcher(taps + point / SHARES * tap_stride() + begin, end - begin, 1).template advance<false>();
  }

  void one_panel(int64_t panel, int64_t block, int64_t following, const float* v, int64_t v_stride) const {
    const int64_t begin = block_begin(block), tiles = block_begin(block + 1) - begin;
    const int64_t chunk = std::min(plan.channel_chunk, p.in_channels), m_stride = point_stride(2 * tiles);
    Scratch scratch;
    float* m = scratch.take<float>(m_stride * POINTS);
    const float* u = kept.u + panel * kept.panel_stride;
    int64_t u_stride = kept.point_stride, u_phase_stride = p.in_channels * PANEL;
    float* made = nullptr;
    if (!p.transformed) {
      u_stride = point_stride(F::PHASES * chunk * 2), u_phase_stride = chunk * PANEL;
      u = made = scratch.take<float>(u_stride * POINTS);
    }

    for (int64_t c = 0; c < p.in_channels; c += chunk, u += p.transformed ? chunk * PANEL : 0) {
      const int64_t channels = std::min(chunk, p.in_channels - c);
      const T* next = nullptr;
      int64_t next_size = 0;
      if (!p.transformed) {
        transform_weights<F, T>(panel_taps(panel) + c * PANEL, tap_stride(), channels, made, u_stride, u_phase_stride);
        // The next chunk's taps come into L2 while this chunk is multiplied.
        const bool last = c + chunk >= p.in_channels;
        next = !last ? panel_taps(panel) + (c + chunk) * PANEL : following >= 0 ? panel_taps(following % panels) : nullptr;
        next_size = std::min(chunk, p.in_channels - (last ? 0 : c + chunk)) * PANEL;
      }
      for (int point = 0; point < POINTS; ++point) {
        if (next != nullptr) prefetch_taps(next, next_size, point);
        const PhaseRun phases = F::run(point);
        for (int64_t i = 0; i < phases.count; ++i) {
          const int64_t phase = phases.first + i;
          multiply_rows({v + point * v_stride + (phase * in_vectors * LANES + c) * tiles, tiles * LANES,
                         u + point * u_stride + phase * u_phase_stride, channels, m + point * m_stride, tiles * LANES,
                         c > 0 || i > 0},
                        tiles);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      transform_output_vectors<F, T>(place(begin + t), m + t * LANES, m_stride, tiles * LANES, p.shift, 2 * panel, 2, p.relu);
    }
  }
};

// U of a layer's packed weights, for a caller that keeps it.
inline void transform_packed(const LayerParams& layer, int64_t stride, bool bfloat16, float* u) {
  const auto run = [&](auto f, auto t) {
    using T = decltype(t);
    transform_layer<decltype(f), T>(static_cast<const T*>(layer.weights), layer.in_channels, layer.out_channels, u);
  };
  if (stride == 2) {
    bfloat16 ? run(Stride2{}, Bf16{}) : run(Stride2{}, float{});
  } else {
    bfloat16 ? run(F4{}, Bf16{}) : run(F4{}, float{});
  }
}

inline int64_t transformed_size(int64_t in_channels, int64_t out_channels, int64_t stride) {
  return stride == 2 ? transformed_elements<Stride2>(in_channels, out_channels)
                     : transformed_elements<F4>(in_channels, out_channels);
}

template <class F, class T>
void run_winograd_as(const ConvParams& p, const WinogradPlan& plan) {
  const WinogradConv<F, T> conv(p, plan);
  plan.by_panels ? conv.by_panels() : conv.by_tiles();
}

template <class T>
void run_winograd(const ConvParams& p, const WinogradPlan& plan) {
  if (p.stride_h == 2) {
    run_winograd_as<Stride2, T>(p, plan);
  } else if (plan.output_tile == 2) {
    run_winograd_as<F2, T>(p, plan);
  } else {
    run_winograd_as<F4, T>(p, plan);
  }
}

inline void winograd(const ConvParams& p, const WinogradPlan& plan) {
  p.bfloat16 ? run_winograd<Bf16>(p, plan) : run_winograd<float>(p, plan);
}

}  // namespace resnet_fused::cpu::RF_ISA
