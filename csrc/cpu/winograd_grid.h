// How a batch of results is cut into Winograd's tiles.
//
// Where M doesn't divide the image's height or width, some tiles have M - 1 results, where enough of them
// can be so: 14 = 4 + 4 + 3 + 3 and 7 = 4 + 3. Only the last of a line of M results has a share of the point at infinity, the last of the A points, so that a
// tile that is one row short needs no products at the last row of points: at 7 x 7 and 14 x 14 a sixth less for all tiles.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

// Tiles of a batch, numbered row by row, image by image.
template <class F>
struct TileGrid {
  explicit TileGrid(const ConvParams& p)
      : in_height(p.height),
        height(p.out_height),
        down((p.out_height + F::M - 1) / F::M),
        across((p.out_width + F::M - 1) / F::M),
        full_down(down - std::min(down, down * F::M - p.out_height)),
        full_across(across - std::min(across, across * F::M - p.out_width)),
        count(p.batch * down * across) {}

  RF_INLINE int64_t image(int64_t tile) const { return tile / (down * across); }
  RF_INLINE int64_t row(int64_t tile) const { return tile / across % down; }
  RF_INLINE int64_t column(int64_t tile) const { return tile % across; }
  RF_INLINE int64_t top(int64_t tile) const { return row(tile) * F::M - std::max<int64_t>(row(tile) - full_down, 0); }
  RF_INLINE int64_t left(int64_t tile) const { return column(tile) * F::M - std::max<int64_t>(column(tile) - full_across, 0); }
  RF_INLINE int64_t rows(int64_t tile) const { return row(tile) < full_down ? F::M : F::M - 1; }
  RF_INLINE int64_t columns(int64_t tile) const { return column(tile) < full_across ? F::M : F::M - 1; }
  // Row of results `offset` below the top of a tile, counted through the whole batch and held within the tile's image.
  RF_INLINE int64_t batch_row(int64_t tile, int64_t offset) const {
    return image(tile) * height + std::min(top(tile) + offset, height);
  }
  // The same for the row of x that this row of results begins with.
  RF_INLINE int64_t x_row(int64_t tile, int64_t offset) const {
    return image(tile) * in_height + std::min((top(tile) + offset) * F::STRIDE, in_height);
  }

  int64_t in_height, height, down, across;
  int64_t full_down, full_across;  // of these, tiles of M rows or columns; the others have M - 1
  int64_t count;
};

// Tiles that go through the stages together, in an order that makes those with products at a point neighbours: first tiles
// short of a row only, then full ones, then those short of a column only, then those short of both.
struct TileRuns {
  int64_t short_of_row, full, short_of_column, short_of_both;

  static TileRuns all_full(int64_t tiles) { return {0, tiles, 0, 0}; }
  RF_INLINE int64_t count() const { return short_of_row + full + short_of_column + short_of_both; }

  struct Run {
    int64_t first, count;
  };
  // The tiles that have products at a point of A x A.
  template <class F>
  RF_INLINE Run at(int point) const {
    const bool last_row = point / F::A == F::A - 1, last_column = point % F::A == F::A - 1;
    const int64_t first = last_row ? short_of_row : 0;
    if (last_column) return {first, short_of_row + full - first};
    return {first, count() - (last_row ? short_of_both : 0) - first};
  }
};

// Sorts the tiles [begin, begin + tiles) of a grid into `order`.
template <class F>
TileRuns sort_tiles(const TileGrid<F>& grid, int64_t begin, int64_t tiles, int64_t* order) {
  const auto kind = [&](int64_t tile) {
    const bool row = grid.rows(tile) == F::M, column = grid.columns(tile) == F::M;
    return row ? (column ? 1 : 2) : (column ? 0 : 3);
  };
  int64_t counts[4] = {}, next[4] = {};
  for (int64_t t = begin; t < begin + tiles; ++t) ++counts[kind(t)];
  for (int i = 1; i < 4; ++i) next[i] = next[i - 1] + counts[i - 1];
  for (int64_t t = begin; t < begin + tiles; ++t) order[next[kind(t)]++] = t;
  return {counts[0], counts[1], counts[2], counts[3]};
}

}  // namespace resnet_fused::cpu::RF_ISA
