// 3 x 3 convolution of padding 1 by Winograd's minimal filtering, in two orders of work. See docs/cpu-kernels.md.
#pragma once

#include "winograd_few.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

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
        kept(transformed_weights<F>(static_cast<const float*>(params.weights), params.bias, params.in_channels,
                                    params.out_channels, params.nonlinearity)),
        panels(panel_count(params.out_channels)),
        in_vectors(vector_count(params.in_channels)),
        blocks((grid.count + how.tiles - 1) / how.tiles) {}

  RF_INLINE int64_t block_begin(int64_t block) const { return grid.count * block / blocks; }
  RF_INLINE const T* panel_taps(int64_t panel) const {
    return static_cast<const T*>(p.weights) + panel * p.in_channels * CHANNEL_TAPS;
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
            grid.left(tile),
            grid.rows(tile),
            grid.columns(tile)};
  }

  // A thread takes a block of tiles through all stages, everything in its L2. Weights that weren't kept transformed are
  // transformed first, once for all threads.
  void by_tiles() const {
    Scratch shared;
    const LayerParams layer{p.weights, p.transformed, p.bias, p.in_channels, p.out_channels};
    const TransformedWeights weights = layer_weights<F, T>(shared, layer, p.nonlinearity);
    parallel_units(blocks, [&](int64_t block, int64_t following) {
      const int64_t begin = block_begin(block), tiles = block_begin(block + 1) - begin;
      const int64_t out_begin = grid.batch_row(begin, 0) * p.out_width * p.out_channels;
      const int64_t out_count = grid.batch_row(begin + tiles - 1, F::M) * p.out_width * p.out_channels - out_begin;
      const int64_t first_steps = POINTS * std::min(plan.panels, panels);
      const auto at_output = [&](auto* data) {
        return data == nullptr ? data : data + out_begin;
      };
      Prefetcher y(at_output(static_cast<const T*>(p.y)), out_count, first_steps);
      Prefetcher residual(at_output(static_cast<const T*>(p.residual == p.y ? nullptr : p.residual)), out_count, first_steps);
      Prefetcher next_x;
      if (following >= 0) {
        const int64_t first = block_begin(following), last = block_begin(following + 1) - 1;
        const int64_t row = grid.x_row(first, 1), rows = grid.x_row(last, F::M + 1) - row;
        const int64_t width = p.width * p.in_channels;
        next_x = Prefetcher(static_cast<const T*>(p.x) + row * width, rows * width, POINTS * panels);
      }
      Scratch scratch;
      int64_t* order = scratch.take<int64_t>(tiles);
      const bool trusted = winograd_tiles<F, T>(
          weights, sort_tiles(grid, begin, tiles, order), plan.panels, [&](int64_t t) { return place(order[t]); },
          [&] {
            next_x.template advance<false>();
            residual.template advance<false>();
            y.template advance<true>();
          });
      note(trusted, p.declined);
    });
  }

  // A thread takes a panel of output channels for a block of tiles, and transforms the panel's weights chunk by chunk, just
  // before their use: for deep layers, whose weights outweigh their pixels. Every thread transforms the tiles for itself: that
  // is faster than reading V from where another core has written it.
  void by_panels() const {
    const bool few = F::PHASES == 1 && grid.count <= FEW_TILES && !p.transformed;
    const int64_t slots = few ? FEW_TILES : plan.tiles;
    parallel_workers(panels * blocks, [&](Units& units) {
      Scratch scratch;
      int64_t* order = scratch.take<int64_t>(slots);
      float* v = scratch.take<float>(point_stride(F::PHASES * in_vectors * slots) * POINTS);
      T* zeros = scratch.take<T>(p.in_channels);
      __builtin_memset(zeros, 0, static_cast<size_t>(p.in_channels) * sizeof(T));
      TileBlock tiles{};
      for (int64_t held = -1; units.take();) {
        const int64_t block = units.current() / panels;
        if (block != held) tiles = transform_block(block, few, order, v, zeros);
        held = block;
        const int64_t panel = units.current() % panels, next = units.following() < 0 ? -1 : units.following() % panels;
        if constexpr (F::PHASES == 1) {
          if (few) {
            few_tiles_panel(panel, next, tiles);
            continue;
          }
        }
        one_panel(panel, next, tiles);
      }
    });
  }

  // Tiles whose V lies in memory, `slots` vectors apart from one vector of channels to the next.
  struct TileBlock {
    const int64_t* order;
    TileRuns runs;
    const float* v;
    int64_t v_stride, slots;
  };

  TileBlock transform_block(int64_t block, bool few, int64_t* order, float* v, const T* zeros) const {
    const int64_t begin = block_begin(block), tiles = block_begin(block + 1) - begin, slots = few ? FEW_TILES : tiles;
    const int64_t v_stride = point_stride(F::PHASES * in_vectors * slots);
    const TileRuns runs = sort_tiles(grid, begin, tiles, order);
    // Tiles that don't exist take part in the products of a few.
    if (tiles < slots) __builtin_memset(v, 0, static_cast<size_t>(v_stride * POINTS) * sizeof(float));
    const auto at = [&](int64_t t) {
      return place(order[t]);
    };
    note(transform_input<F, T>(tiles, at, zeros, v, v_stride, in_vectors, slots * LANES), p.declined);
    return {order, runs, v, v_stride, slots};
  }

  void transform_output(int64_t panel, const TileBlock& tiles, const float* m, int64_t m_stride) const {
    for (int64_t t = 0; t < tiles.runs.count(); ++t) {
      transform_output_vectors<F, T>(place(tiles.order[t]), m + t * LANES, m_stride, tiles.slots * LANES, p.bias, 2 * panel, 2,
                                     p.nonlinearity);
    }
  }

  void few_tiles_panel(int64_t panel, int64_t following, const TileBlock& tiles) const {
    const int64_t m_stride = point_stride(2 * FEW_TILES);
    const bool two_by_two_short = tiles.runs.short_of_row == 1 && tiles.runs.full == 1 && tiles.runs.short_of_column == 1;
    Scratch scratch;
    float* m = scratch.take<float>(m_stride * POINTS);
    const T* taps = panel_taps(panel);
    for (int64_t c = 0; c < p.in_channels; c += FEW_CHANNELS, taps += FEW_CHANNELS * CHANNEL_TAPS) {
      const bool last = c + FEW_CHANNELS >= p.in_channels;
      const T* next = !last ? taps + FEW_CHANNELS * CHANNEL_TAPS : following >= 0 ? panel_taps(following) : taps;
      for (int64_t half = 0; half < PANEL; half += LANES) {
        multiply_few_tiles<F, T>({taps + half, half == 0 ? taps + LANES : next, std::min(FEW_CHANNELS, p.in_channels - c),
                                  tiles.v + c * FEW_TILES, tiles.v_stride, m + half * FEW_TILES, m_stride, c > 0},
                                 two_by_two_short);
      }
    }
    transform_output(panel, tiles, m, m_stride);
  }

  // A share of the next chunk's `size` taps at every point: memory keeps up with an even flow, not with bursts.
  RF_INLINE void prefetch_taps(const T* taps, int64_t size, int point) const {
    constexpr int LINE = 64 / sizeof(T);
    for (int64_t i = size * point / POINTS; i < size * (point + 1) / POINTS; i += LINE) prefetch_l1(taps + i);
  }

  void one_panel(int64_t panel, int64_t following, const TileBlock& tiles) const {
    const int64_t chunk = std::min(plan.channel_chunk, p.in_channels), m_stride = point_stride(2 * tiles.slots);
    Scratch scratch;
    float* m = scratch.take<float>(m_stride * POINTS);
    const float* u = kept.u + panel * kept.panel_stride;
    int64_t u_stride = kept.point_stride, u_phase_stride = p.in_channels * PANEL;
    float* made = nullptr;  // a row of points
    if (!p.transformed) {
      u_stride = point_stride(F::PHASES * chunk * 2), u_phase_stride = chunk * PANEL;
      made = scratch.take<float>(u_stride * F::A);
    }

    for (int64_t c = 0; c < p.in_channels; c += chunk, u += p.transformed ? chunk * PANEL : 0) {
      const int64_t channels = std::min(chunk, p.in_channels - c);
      const T* next = nullptr;
      int64_t next_size = 0;
      if (!p.transformed) {
        // The next chunk's taps come while this chunk is multiplied.
        const bool last = c + chunk >= p.in_channels;
        next = !last ? panel_taps(panel) + (c + chunk) * CHANNEL_TAPS : following >= 0 ? panel_taps(following) : nullptr;
        next_size = std::min(chunk, p.in_channels - (last ? 0 : c + chunk)) * CHANNEL_TAPS;
      }
      for (int point = 0; point < POINTS; ++point) {
        const int column = point % F::A;
        if (!p.transformed && column == 0) {
          ROW_TRANSFORMS<F, T>[static_cast<size_t>(point / F::A)](panel_taps(panel) + c* CHANNEL_TAPS, channels, made, u_stride,
                                                                  u_phase_stride);
        }
        const float* b = p.transformed ? u + point * u_stride : made + column * u_stride;
        if (next != nullptr) prefetch_taps(next, next_size, point);
        const PhaseRun phases = F::run(point);
        const TileRuns::Run run = tiles.runs.template at<F>(point);
        for (int64_t i = 0; i < phases.count; ++i) {
          const int64_t phase = phases.first + i;
          const float* v = tiles.v + point * tiles.v_stride + (phase * in_vectors * LANES + c) * tiles.slots;
          multiply_rows({v + run.first * LANES, tiles.slots * LANES, b + phase * u_phase_stride, channels,
                         m + point * m_stride + run.first * LANES, tiles.slots * LANES, c > 0 || i > 0},
                        run.count);
        }
      }
    }
    transform_output(panel, tiles, m, m_stride);
  }
};

// U of a layer's packed weights, for a caller that keeps it.
inline void transform_packed(const LayerParams& layer, int64_t stride, DType dtype, float* u) {
  const auto run = [&](auto f, auto t) {
    using T = decltype(t);
    transform_layer<decltype(f), T>(static_cast<const T*>(layer.weights), layer.in_channels, layer.out_channels, u);
  };
  if (stride == 2) {
    with_element(dtype, [&](auto t) { run(Stride2{}, t); });
  } else {
    with_element(dtype, [&](auto t) { run(F4{}, t); });
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
  with_element(p.source, [&](auto t) { run_winograd<decltype(t)>(p, plan); });
}

}  // namespace resnet_fused::cpu::RF_ISA
