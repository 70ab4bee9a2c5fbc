// Grouped and depthwise convolutions, by direct sums in float32, with the epilogue. A vector of results is LANES output
// channels, of one group or of several; the tile below differs for them only in how a pixel becomes the vector that its weights
// multiply.
#pragma once

#include "group_lanes.h"
#include "tile.h"

namespace resnet_fused::cpu::RF_ISA {

// Results of a tile: up to two rows of so many pixels, of one vector of channels. On AVX-512 14 accumulators, which leave
// registers for the weights of two rows of a 7 x 7 filter; 7 is the width of a ResNet's last images.
constexpr int GROUPED_COLUMNS = LANES > 8 ? 7 : 4;

// A tile of results, and the window of x that they see. The window's rows are numbered from 0, like its columns.
template <class T>
struct GroupedTile {
  const T* x;          // the window's first pixel, which may lie outside of the image, at the vector's first input channel
  int64_t row_stride;  // of x
  int64_t pixel_stride;
  int64_t first_row, last_row;  // rows of the window that lie inside of the image
  uint32_t inside;              // columns that do, and that results need, as bits
  int64_t channels;             // of a group, on the input side
  int64_t in_lanes;             // input channels of the vector's groups, where they are one vector
  const int32_t* order;         // SpreadGroups: [channel][LANES]
  int64_t first_group;          // TwoGroups: lanes of the first
  const float* weights;         // [kernel row][channel][kernel column][LANES]
  const float* bias;
  const T* residual;  // of the first result, or null
  T* y;
  int64_t y_row_stride, y_pixel_stride;
  int columns;        // of results that exist
  int64_t out_lanes;  // channels that exist
  Nonlinearity nonlinearity;
};

// ---- How a pixel becomes the vector that the weights of input channel `k` of each group multiply ----------------------------
//
// From one channel to the next, `pixel` moves on by STEP.

// Depthwise: as it is.
struct OwnChannel {
  static constexpr bool ONE = true;
  static constexpr int STEP = 0;
  template <bool EDGE, class T>
  static RF_INLINE vec take(const GroupedTile<T>& t, const T* pixel, int64_t) {
    return EDGE ? load(pixel, static_cast<int>(t.in_lanes)) : load(pixel);
  }
};

// Small groups, several in a vector: channel k of each, spread over the lanes of its results.
struct SpreadGroups {
  static constexpr bool ONE = false;
  static constexpr int STEP = 0;
  template <bool EDGE, class T>
  static RF_INLINE vec take(const GroupedTile<T>& t, const T* pixel, int64_t k) {
    return permute(OwnChannel::take<EDGE>(t, pixel, 0), t.order + k * LANES);
  }
};

// Wide groups: one channel for all lanes.
struct OneGroup {
  static constexpr bool ONE = false;
  static constexpr int STEP = 1;
  template <bool EDGE, class T>
  static RF_INLINE vec take(const GroupedTile<T>&, const T* pixel, int64_t) {
    return splat(*pixel);
  }
};

// A vector in which one wide group ends and the next begins.
struct TwoGroups {
  static constexpr bool ONE = false;
  static constexpr int STEP = 1;
  template <bool EDGE, class T>
  static RF_INLINE vec take(const GroupedTile<T>& t, const T* pixel, int64_t) {
    return blend(splat(*pixel), splat(pixel[t.channels]), static_cast<int>(t.first_group));
  }
};

// ---- The tile --------------------------------------------------------------------------------------------------------------

// A square filter, of equal stride in height and width.
template <int KERNEL, int STRIDE>
struct Filter {
  static constexpr int READ = (GROUPED_COLUMNS - 1) * STRIDE + KERNEL;  // columns that a tile reads
};

// Adds the products of the window's row r to the rows [FIRST, LAST) of results. EDGE: some column, result or channel isn't
// there.
template <class Channels, int FIRST, int LAST, bool EDGE, int KERNEL, int STRIDE, int ROWS, class T>
RF_INLINE void add_row(vec (&acc)[ROWS][GROUPED_COLUMNS], const GroupedTile<T>& t, int64_t r, Filter<KERNEL, STRIDE>) {
  constexpr int READ = Filter<KERNEL, STRIDE>::READ;
  const T* row = t.x + r * t.row_stride;
  const int64_t channels = Channels::ONE ? 1 : t.channels;
  const float* weights = t.weights + r * channels * KERNEL * LANES;
  constexpr int MOVING = Channels::STEP != 0 ? (READ + 2) / 3 : 0;
  const T* columns[MOVING + 1];  // each the first of three
  RF_UNROLL(8)
  for (int i = 0; i < MOVING; ++i) columns[i] = row + 3 * i * t.pixel_stride;
  for (int64_t k = 0; k < channels; ++k, weights += KERNEL * LANES) {
    // Else GCC keeps a pointer for each column, more than there are registers for.
    RF_UNROLL(8)
    for (int i = 0; i < MOVING; ++i) __asm__("" : "+r"(columns[i]));
    vec w[ROWS][KERNEL];
    RF_UNROLL(2)
    for (int i = FIRST; i < LAST; ++i) {
      RF_UNROLL(8)
      for (int kw = 0; kw < KERNEL; ++kw) w[i][kw] = load(weights + (kw - i * STRIDE * channels * KERNEL) * LANES);
    }
    RF_UNROLL(32)
    for (int j = 0; j < READ; ++j) {
      // Beside the image there is nothing to add: products of zeros would be NaN where a weight is Inf.
      if (EDGE && (t.inside >> j & 1) == 0) continue;
      const vec x =
          Channels::template take<EDGE>(t, (MOVING ? columns[j / 3] + j % 3 * t.pixel_stride : row + j * t.pixel_stride), k);
      RF_UNROLL(2)
      for (int i = FIRST; i < LAST; ++i) {
        RF_UNROLL(8)
        for (int kw = 0; kw < KERNEL; ++kw) {
          const int column = (j - kw) / STRIDE;
          if (j >= kw && (j - kw) % STRIDE == 0 && column < GROUPED_COLUMNS) acc[i][column] = fma(x, w[i][kw], acc[i][column]);
        }
      }
    }
    RF_UNROLL(8)
    for (int i = 0; i < MOVING; ++i) columns[i] += Channels::STEP;
  }
}

template <class Channels, int ROWS, bool EDGE, int KERNEL, int STRIDE, class T>
__attribute__((noinline)) void grouped_tile(const GroupedTile<T>& t, Filter<KERNEL, STRIDE> filter) {
  vec acc[ROWS][GROUPED_COLUMNS];
  const vec bias = EDGE ? load(t.bias, static_cast<int>(t.out_lanes)) : load(t.bias);
  RF_UNROLL(2)
  for (int i = 0; i < ROWS; ++i) {
    RF_UNROLL(8)
    for (int column = 0; column < GROUPED_COLUMNS; ++column) acc[i][column] = bias;
  }
  for (int64_t r = t.first_row; r < t.last_row; ++r) {
    if (ROWS == 1 || r < STRIDE) {
      add_row<Channels, 0, 1, EDGE>(acc, t, r, filter);
    } else if (r < KERNEL) {
      add_row<Channels, 0, ROWS, EDGE>(acc, t, r, filter);
    } else {
      add_row<Channels, ROWS - 1, ROWS, EDGE>(acc, t, r, filter);
    }
  }
  // Read before the first store, which may change t for all that the compiler knows.
  const T* residual = t.residual;
  T* y = t.y;
  const int64_t row_stride = t.y_row_stride, pixel_stride = t.y_pixel_stride, out_lanes = t.out_lanes;
  const int columns = t.columns;
  const Nonlinearity nonlinearity = t.nonlinearity;
  const vec floor = floor_of(nonlinearity);
  RF_UNROLL(2)
  for (int i = 0; i < ROWS; ++i) {
    RF_UNROLL(8)
    for (int column = 0; column < GROUPED_COLUMNS; ++column) {
      if (EDGE && column >= columns) continue;
      const int64_t at = i * row_stride + column * pixel_stride;
      const T* added = residual == nullptr ? nullptr : residual + at;
      if (EDGE) {
        finish(acc[i][column], added, y + at, floor, out_lanes);
      } else {
        finish(acc[i][column], added, y + at, floor);
      }
    }
    apply_nonlinearity(nonlinearity, y + i * row_stride, columns, pixel_stride, std::min<int64_t>(out_lanes, LANES));
  }
}

// ---- The convolution -------------------------------------------------------------------------------------------------------

template <class Channels, class T, int KERNEL, int STRIDE>
RF_INLINE void grouped_tile(const GroupedTile<T>& t, int64_t rows, bool whole, Filter<KERNEL, STRIDE> filter) {
  if (whole) {
    rows == 2 ? grouped_tile<Channels, 2, false>(t, filter) : grouped_tile<Channels, 1, false>(t, filter);
  } else {
    rows == 2 ? grouped_tile<Channels, 2, true>(t, filter) : grouped_tile<Channels, 1, true>(t, filter);
  }
}

// The lines of x, and those of y, that the two lines of results below will need, fetched a few with each tile in the order in
// which they lie in memory.
class LinesBelow {
 public:
  LinesBelow(const void* x, int64_t x_bytes, const void* y, int64_t y_bytes, int64_t tiles)
      : x_(static_cast<const char*>(x)),
        y_(static_cast<const char*>(y)),
        x_share_(share(x_bytes, tiles)),
        y_share_(share(y_bytes, tiles)) {}

  RF_INLINE void advance() {
    for (int64_t i = 0; i < x_share_; ++i, x_ += LINE) prefetch_l2(x_);
    for (int64_t i = 0; i < y_share_; ++i, y_ += LINE) prefetch_for_write(y_);
  }

 private:
  static constexpr int64_t LINE = 64;
  static int64_t share(int64_t bytes, int64_t tiles) { return (bytes + tiles * LINE - 1) / (tiles * LINE); }

  const char *x_, *y_;
  const int64_t x_share_, y_share_;
};

// Lines of results [begin, end) of image n, of the output channels of some vectors. t's strides are those of the image, of
// which `image` is the first pixel. `ahead`: fetches what is used next.
template <class T, int KERNEL, int STRIDE>
void grouped_lines(const ConvParams& p, GroupedTile<T>& t, const T* image, int64_t n, int64_t begin, int64_t end,
                   const GroupVector* vectors_begin, const GroupVector* vectors_end, bool ahead,
                   Filter<KERNEL, STRIDE> filter) {
  constexpr int READ = Filter<KERNEL, STRIDE>::READ;
  constexpr int64_t element = sizeof(T);
  for (int64_t o = begin; o < end; o += 2) {
    const int64_t rows = std::min<int64_t>(2, end - o), top = o * STRIDE - p.pad_h;
    t.first_row = std::max<int64_t>(0, -top);
    t.last_row = std::min((rows - 1) * STRIDE + KERNEL, p.height - top);
    const int64_t x_below = ahead ? 2 * STRIDE * t.row_stride : 0, y_below = ahead ? 2 * t.y_row_stride : 0;
    const int64_t tiles = (p.out_width + GROUPED_COLUMNS - 1) / GROUPED_COLUMNS * (vectors_end - vectors_begin);
    LinesBelow below(image + (top + STRIDE + KERNEL) * t.row_stride, x_below * element,
                     static_cast<const T*>(p.y) + (n * p.out_height + o + 2) * t.y_row_stride, y_below * element, tiles);
    for (int64_t column = 0; column < p.out_width; column += GROUPED_COLUMNS) {
      const int64_t left = column * STRIDE - p.pad_w;
      t.columns = static_cast<int>(std::min<int64_t>(GROUPED_COLUMNS, p.out_width - column));
      const int64_t read = (t.columns - 1) * STRIDE + KERNEL;
      const int64_t first = std::min<int64_t>(std::max<int64_t>(0, -left), READ);
      const int64_t last = std::max(first, std::min(read, p.width - left));
      t.inside = (uint32_t{1} << last) - (uint32_t{1} << first);
      const bool all_columns = last - first == READ;
      const T* x = image + top * t.row_stride + left * t.pixel_stride;
      const int64_t at = ((n * p.out_height + o) * p.out_width + column) * p.out_channels;
      for (const GroupVector* v = vectors_begin; v < vectors_end; ++v) {
        below.advance();
        t.x = x + v->first_input;
        t.in_lanes = v->inputs, t.out_lanes = v->outputs, t.first_group = v->first_group;
        t.weights = static_cast<const float*>(p.weights) + v->weights;
        t.bias = p.bias + v->first_output;
        t.residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + at + v->first_output;
        t.y = static_cast<T*>(p.y) + at + v->first_output;
        const bool whole = all_columns && v->whole;
        if (v->kind == GroupKind::own_channel) {
          grouped_tile<OwnChannel>(t, rows, whole, filter);
        } else if constexpr (KERNEL == 3) {
          if (v->kind == GroupKind::spread_groups) {
            grouped_tile<SpreadGroups>(t, rows, whole, filter);
          } else if (v->kind == GroupKind::one_group) {
            grouped_tile<OneGroup>(t, rows, whole, filter);
          } else {
            grouped_tile<TwoGroups>(t, rows, whole, filter);
          }
        }
      }
    }
  }
}

// A vector's input channels of lines of an image, copied side by side: in wide layers pixels are so far apart that they fall
// into a few sets of L1, and each would be a wait of its own.
template <class T>
struct GroupCopy {
  T* data;
  int64_t n, begin, first_input, inputs;  // what is in it

  // Copies lines [from, to) of image n, unless they are there, and sets t's strides. Returns where the image would begin.
  const T* fill(const ConvParams& p, GroupedTile<T>& t, int64_t image, int64_t from, int64_t to, const GroupVector& v) {
    if (image != n || from != begin || v.first_input != first_input || v.inputs != inputs) {
      n = image, begin = from, first_input = v.first_input, inputs = v.inputs;
      const T* pixel = static_cast<const T*>(p.x) + (n * p.height + from) * p.width * p.in_channels + first_input;
      T* copy = data;
      for (int64_t count = (to - from) * p.width; count > 0; --count, pixel += p.in_channels, copy += inputs) {
        __builtin_memcpy(copy, pixel, static_cast<size_t>(inputs) * sizeof(T));
      }
    }
    t.row_stride = p.width * inputs, t.pixel_stride = inputs;
    return data - begin * t.row_stride - first_input;
  }
};

// Weights up to this many elements are left in L2 while the pixels pass, whose vectors follow each other as they do in memory;
// with more, each vector's weights stay in L1 while a copy of its channels passes, of up to so many lines.
constexpr int64_t RESIDENT_GROUPS = 128 * 1024, COPIED_GROUP = 64 * 1024;

// x and y from this many bytes on are fetched ahead: they come from memory. In the caches it costs a tenth of a layer's time.
constexpr int64_t FETCHED_AHEAD = 12 << 20;

template <class T, int KERNEL, int STRIDE>
void grouped_as(const ConvParams& p, Filter<KERNEL, STRIDE> filter) {
  const GroupLanes lanes(p.groups, p.in_channels, p.out_channels);
  const bool resident = lanes.blocks * KERNEL * KERNEL * lanes.in * LANES <= RESIDENT_GROUPS;
  const int64_t elements = p.batch * (p.height * p.width * p.in_channels + p.out_height * p.out_width * p.out_channels);
  const bool ahead = resident && elements * static_cast<int64_t>(sizeof(T)) >= FETCHED_AHEAD;
  // Four units a thread: images, then parts of eight lines and more, then of the channels.
  const auto more = [](int64_t units) {
    return (4 * thread_count() + units - 1) / units;
  };
  const int64_t line_blocks = resident ? std::clamp<int64_t>(p.out_height / 8, 1, more(p.batch))
                                       : std::clamp<int64_t>(p.height * p.width * lanes.in / COPIED_GROUP, 1, p.out_height);
  const int64_t images = p.batch * line_blocks, parts = std::min(lanes.blocks, more(images));
  parallel_workers(images * parts, [&](Units& units) {
    Scratch scratch;
    GroupedTile<T> t{};
    t.row_stride = p.width * p.in_channels, t.pixel_stride = p.in_channels;
    t.channels = lanes.in;
    t.y_row_stride = p.out_width * p.out_channels, t.y_pixel_stride = p.out_channels;
    t.nonlinearity = p.nonlinearity;
    const GroupVector* vectors = lanes.vectors(scratch.take<GroupVector>(lanes.blocks), KERNEL * KERNEL);
    t.order = lanes.together > 1 ? lanes.spread(scratch.take<int32_t>(lanes.in * LANES)) : nullptr;
    const int64_t most_lines = ((p.out_height - 1) / line_blocks) * STRIDE + KERNEL;
    GroupCopy<T> copy{nullptr, -1, -1, -1, -1};
    if (!resident) copy.data = scratch.take<T>(std::min(most_lines, p.height) * p.width * lanes.most_inputs());
    while (units.take()) {
      const int64_t part = units.current() % parts, lines = units.current() / parts, n = lines / line_blocks;
      const int64_t begin = p.out_height * (lines % line_blocks) / line_blocks;
      const int64_t end = p.out_height * (lines % line_blocks + 1) / line_blocks;
      const GroupVector* first = vectors + lanes.blocks * part / parts;
      const GroupVector* last = vectors + lanes.blocks * (part + 1) / parts;
      const int64_t from = std::clamp<int64_t>(begin * STRIDE - p.pad_h, 0, p.height);
      const int64_t to = std::clamp<int64_t>((end - 1) * STRIDE - p.pad_h + KERNEL, from, p.height);
      const int64_t together = resident ? last - first : 1;
      for (const GroupVector* v = first; v < last; v += together) {
        const T* image = resident ? static_cast<const T*>(p.x) + n * p.height * t.row_stride : copy.fill(p, t, n, from, to, *v);
        grouped_lines(p, t, image, n, begin, end, v, v + together, ahead, filter);
      }
    }
  });
}

template <class T>
void grouped_as(const ConvParams& p) {
  const bool two = p.stride_h == 2;
  switch (p.kernel_h) {
    case 3:
      return two ? grouped_as<T>(p, Filter<3, 2>{}) : grouped_as<T>(p, Filter<3, 1>{});
    case 5:
      return two ? grouped_as<T>(p, Filter<5, 2>{}) : grouped_as<T>(p, Filter<5, 1>{});
    default:
      return two ? grouped_as<T>(p, Filter<7, 2>{}) : grouped_as<T>(p, Filter<7, 1>{});
  }
}

inline void grouped(const ConvParams& p) {
  with_element(p.source, [&](auto t) { grouped_as<decltype(t)>(p); });
}

}  // namespace resnet_fused::cpu::RF_ISA
