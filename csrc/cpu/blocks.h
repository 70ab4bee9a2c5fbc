// Whole residual blocks of stride 1, strip by strip: a few rows of the image go through all layers, so that the results in
// between stay in L2. Rows that the next strip's 3 x 3 needs again are kept, so that nothing is computed twice within a part.
#pragma once

#include "pointwise.h"
#include "row_buffer.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// What both kinds of block share: the image's geometry and the cut into strips. One object serves one unit of work.
struct BlockPart {
  using F = F4;

  const BlockParams& p;
  const int64_t tile_rows, tiles_across;
  const int64_t begin, end;  // rows of tiles that this part computes
  const Activation* x;       // of this image
  Activation* y;

  BlockPart(const BlockParams& params, int64_t unit)
      : p(params),
        tile_rows((p.height + F::M - 1) / F::M),
        tiles_across((p.width + F::M - 1) / F::M),
        begin(tile_rows * (unit % p.parts) / p.parts),
        end(tile_rows * (unit % p.parts + 1) / p.parts),
        x(static_cast<const Activation*>(p.x) + unit / p.parts * p.height * p.width * p.layers[0].in_channels),
        y(static_cast<Activation*>(p.y) + unit / p.parts * p.height * p.width * out_channels()) {}

  int64_t out_channels() const { return p.layers[2].weights == nullptr ? p.layers[1].out_channels : p.layers[2].out_channels; }
  RF_INLINE int64_t clamp_row(int64_t row) const { return row < 0 ? 0 : row > p.height ? p.height : row; }
  RF_INLINE const Activation* x_row(int64_t h) const { return x + h * p.width * p.layers[0].in_channels; }
  RF_INLINE Activation* y_row(int64_t h) const { return y + h * p.width * out_channels(); }

  // The 3 x 3 layer `weights` on rows of tiles [first, last).
  template <class Between>
  void convolve(const TransformedWeights& weights, const Strip<const Activation>& from, const Strip<const Activation>& residual,
                const Strip<Activation>& to, int64_t first, int64_t last, Between&& between) const {
    const bool trusted = winograd_tiles<F, Activation>(
        weights, TileRuns::all_full((last - first) * tiles_across), p.panels,
        [&](int64_t t) -> TilePlace<Activation> {
          return {from, residual, to, (first + t / tiles_across) * F::M, t % tiles_across * F::M, F::M, F::M};
        },
        between);
    note(trusted, p.declined);
  }

  // 1 x 1 layer on rows [first, last) of an image whose row `first` lies at `from`.
  void multiply(const LayerParams& layer, const Activation* from, int64_t first, int64_t last, const Activation* residual,
                Activation* to, const Nonlinearity& nonlinearity) const {
    pointwise_rows(reinterpret_cast<const Unit*>(from), (last - first) * p.width, layer.in_channels / CHANNELS_PER_UNIT,
                   static_cast<const float*>(layer.weights), layer.bias, residual, to, layer.out_channels, nonlinearity);
  }

  // The shortcut of rows [first, last): x itself, or its projection, which is put where the result will be.
  const Activation* shortcut(int64_t first, int64_t last) const {
    if (p.shortcut.weights == nullptr) return x_row(first);
    multiply(p.shortcut, x_row(first), first, last, nullptr, y_row(first), NO_NONLINEARITY);
    return y_row(first);
  }
};

template <class Unit>
void for_each_part(const BlockParams& p, Unit&& unit) {
  parallel_units(p.batch * p.parts, [&](int64_t u, int64_t) { unit(BlockPart(p, u)); });
}

inline void bottleneck(const BlockParams& p) {
  constexpr int64_t M = BlockPart::F::M;
  // Clang before 16 captures no structured bindings.
  const LayerParams &reduce = p.layers[0], &spatial = p.layers[1], &expand = p.layers[2];
  Scratch shared;
  const TransformedWeights weights = layer_weights<BlockPart::F, Activation>(shared, spatial, RELU);

  for_each_part(p, [&](const BlockPart& part) {
    Scratch scratch;
    RowBuffer<Activation> reduced(scratch, M * p.strip + 2, p.height, p.width, reduce.out_channels);
    RowBuffer<Activation> convolved(scratch, M * p.strip, p.height, p.width, spatial.out_channels);
    reduced.restart(part.clamp_row(M * part.begin - 1));

    for (int64_t first = part.begin; first < part.end; first += p.strip) {
      const int64_t last = std::min(first + p.strip, part.end);
      const int64_t top = M * first, bottom = part.clamp_row(M * last);

      // 1 x 1 on the rows that the strip's tiles need and that aren't there yet
      const int64_t needed = part.clamp_row(M * last + 1);
      reduced.keep_from(part.clamp_row(top - 1));
      part.multiply(reduce, part.x_row(reduced.end()), reduced.end(), needed, nullptr, reduced.row(reduced.end()), RELU);
      reduced.grow_to(needed);

      // 3 x 3, while the next strip's rows of x come into L2
      const int64_t next = last < part.end ? part.clamp_row(M * (last + p.strip) + 1) : needed;
      Prefetcher next_x(part.x_row(needed), (next - needed) * p.width * reduce.in_channels,
                        BlockPart::F::A * BlockPart::F::A * panel_count(spatial.out_channels));
      convolved.restart(top);
      part.convolve(weights, reduced.strip<const Activation>(), {}, convolved.strip<Activation>(), first, last,
                    [&] { next_x.template advance<false>(); });

      // 1 x 1, shortcut, ReLU
      part.multiply(expand, convolved.row(top), top, bottom, part.shortcut(top, bottom), part.y_row(top), RELU);
    }
  });
}

inline void basic_block(const BlockParams& p) {
  constexpr int64_t M = BlockPart::F::M;
  constexpr int64_t POINTS = BlockPart::F::A * BlockPart::F::A;
  const LayerParams &first_layer = p.layers[0], &second_layer = p.layers[1];
  Scratch shared;
  const TransformedWeights first_weights = layer_weights<BlockPart::F, Activation>(shared, first_layer, RELU);
  const TransformedWeights second_weights = layer_weights<BlockPart::F, Activation>(shared, second_layer, RELU);

  for_each_part(p, [&](const BlockPart& part) {
    Scratch scratch;
    RowBuffer<Activation> inner(scratch, M * (p.strip + 2), p.height, p.width, first_layer.out_channels);
    const int64_t channels = second_layer.out_channels;
    const Strip<const Activation> x{part.x, 0, p.height, p.width, first_layer.in_channels};
    const Strip<Activation> y{part.y, 0, p.height, p.width, channels};
    const Strip<const Activation> residual{p.shortcut.weights == nullptr ? part.x : part.y, 0, p.height, p.width, channels};
    // The first layer runs one row of tiles ahead of the second, which looks one pixel row over its strip's lower edge.
    int64_t done = std::max<int64_t>(part.begin - 1, 0);
    inner.restart(M * done);

    for (int64_t first = part.begin; first < part.end; first += p.strip) {
      const int64_t last = std::min(first + p.strip, part.end);
      const int64_t ahead = std::min(last + 1, part.tile_rows);
      const int64_t next = part.clamp_row(M * (ahead + p.strip) + 1), from = part.clamp_row(M * ahead + 1);
      Prefetcher next_x(part.x_row(from), last < part.end ? (next - from) * p.width * first_layer.in_channels : 0,
                        POINTS * panel_count(first_layer.out_channels));
      part.convolve(first_weights, x, {}, inner.strip<Activation>(), done, ahead, [&] { next_x.template advance<false>(); });
      inner.grow_to(part.clamp_row(M * ahead));
      done = ahead;

      const int64_t top = M * first, bottom = part.clamp_row(M * last);
      part.shortcut(top, bottom);
      Prefetcher next_y(part.y_row(top), (bottom - top) * p.width * channels,
                        POINTS * std::min(p.panels, panel_count(channels)));
      part.convolve(second_weights, inner.strip<const Activation>(), residual, y, first, last,
                    [&] { next_y.template advance<true>(); });
      inner.keep_from(part.clamp_row(M * last - 1));
    }
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
