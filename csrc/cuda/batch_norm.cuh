// Batch norm's passes over channels_last activations: statistics, apply, and the two passes of the gradient.
// A thread keeps its VECTOR channels and goes down the rows, so parameters by channel are read once and sums stay in
// registers. Sums are added in a fixed order, so that results don't depend on timing.
#pragma once

#include "element.cuh"
#include "batch_norm_params.h"
#include "ptx.cuh"

namespace resnet_fused {

constexpr int BATCH_NORM_THREADS = 256;

// VECTOR elements: 16 bytes, or one where the channels make no whole 16 bytes.
template <class T, int VECTOR>
struct Elements {
  float v[VECTOR];

  __device__ __forceinline__ static Elements load(const void* from, int64_t index) {
    Elements e;
    if constexpr (VECTOR == 1) {
      e.v[0] = to_float(static_cast<const T*>(from)[index]);
    } else {
      Vector16<T>::unpack(ptx::load_global_16(static_cast<const T*>(from) + index, true), e.v);
    }
    return e;
  }

  __device__ __forceinline__ void store(void* to, int64_t index) const {
    if constexpr (VECTOR == 1) {
      static_cast<T*>(to)[index] = from_float<T>(v[0]);
    } else {
      ptx::store_global_16(static_cast<T*>(to) + index, Vector16<T>::pack(v), true);
    }
  }
};

// The part of the activations that a thread walks.
template <int VECTOR>
struct RowWalk {
  int64_t row, row_step;
  int channel, column, line, lines;  // line: the thread's place along the rows of its block
  bool inside;

  __device__ explicit RowWalk(const BatchNormParams& p) {
    column = threadIdx.x & (p.columns - 1), line = threadIdx.x / p.columns, lines = BATCH_NORM_THREADS / p.columns;
    channel = (blockIdx.x * p.columns + column) * VECTOR;
    inside = channel < p.channels;
    row = int64_t(blockIdx.y) * lines + line, row_step = int64_t(p.groups) * lines;
  }
};

template <int VECTOR>
struct Channels {
  float v[VECTOR];
  __device__ Channels(const float* by_channel, int channel, bool inside, float otherwise) {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) v[k] = by_channel != nullptr && inside ? by_channel[channel + k] : otherwise;
  }
};

__device__ __forceinline__ float inverse_deviation(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// dy where ReLU let the value through, as PyTorch's threshold_backward has it: a NaN in y lets it through.
__device__ __forceinline__ float masked_gradient(float dy, float y) { return y <= 0.0f ? 0.0f : dy; }

// Number, mean and sum of squared differences from the mean. Source: Chan, Golub and LeVeque, 1979.
struct Moments {
  float count, mean, squares;

  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    if (other.count == 0.0f) return;
    const float delta = other.mean - mean, share = other.count / total;
    squares += other.squares + delta * delta * count * share;
    mean = count == 0.0f ? other.mean : mean + delta * share;
    count = total;
  }
};

// Adds up `values` over the lines of a block; the result is that of line 0. shared: BATCH_NORM_THREADS floats.
template <int VECTOR>
__device__ __forceinline__ void sum_over_lines(float (&values)[VECTOR], int columns, int lines, float* shared) {
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    shared[threadIdx.x] = values[k];
    __syncthreads();
    for (int half = lines / 2; half > 0; half /= 2) {
      if (threadIdx.x < half * columns) shared[threadIdx.x] += shared[threadIdx.x + half * columns];
      __syncthreads();
    }
    values[k] = shared[threadIdx.x];
    __syncthreads();
  }
}

// Mean and squared differences of each channel over the rows of a block.
template <class T, int VECTOR>
__device__ __forceinline__ void bn_statistics(const BatchNormParams& p) {
  __shared__ Moments shared[BATCH_NORM_THREADS];
  const RowWalk<VECTOR> walk(p);
  float shift[VECTOR], sum[VECTOR] = {}, squares[VECTOR] = {};
  int count = 0;
  if (walk.inside && walk.row < p.rows) {
    // Differences from the thread's first value are small, whatever the mean: their squares lose nothing.
    const auto first = Elements<T, VECTOR>::load(p.x, walk.row * p.channels + walk.channel);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) shift[k] = first.v[k];
    for (int64_t row = walk.row; row < p.rows; row += walk.row_step, ++count) {
      const auto x = Elements<T, VECTOR>::load(p.x, row * p.channels + walk.channel);
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        const float d = x.v[k] - shift[k];
        sum[k] += d, squares[k] += d * d;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    const float n = float(count);
    shared[threadIdx.x] = count == 0 ? Moments{0, 0, 0} : Moments{n, shift[k] + sum[k] / n, squares[k] - sum[k] * (sum[k] / n)};
    __syncthreads();
    for (int half = walk.lines / 2; half > 0; half /= 2) {
      if (threadIdx.x < half * p.columns) shared[threadIdx.x].merge(shared[threadIdx.x + half * p.columns]);
      __syncthreads();
    }
    if (walk.line == 0 && walk.inside) {
      float* partial = p.partial + int64_t(blockIdx.y) * 2 * p.channels + walk.channel + k;
      partial[0] = shared[threadIdx.x].mean, partial[p.channels] = shared[threadIdx.x].squares;
    }
    __syncthreads();
  }
}

// Rows that block `group` of the statistics took.
__device__ __forceinline__ int64_t rows_of_group(const BatchNormParams& p, int lines, int group) {
  const int64_t sweep = int64_t(p.groups) * lines, rest = p.rows % sweep - int64_t(group) * lines;
  return p.rows / sweep * lines + (rest < 0 ? 0 : rest > lines ? lines : rest);
}

// Mean and biased variance from the blocks' moments; one thread a channel and 32 threads along the groups.
constexpr int FINISH_CHANNELS = 8, FINISH_LINES = BATCH_NORM_THREADS / FINISH_CHANNELS;

__device__ __forceinline__ void bn_statistics_finish(const BatchNormParams& p) {
  __shared__ Moments shared[BATCH_NORM_THREADS];
  const int column = threadIdx.x % FINISH_CHANNELS, line = threadIdx.x / FINISH_CHANNELS;
  const int channel = blockIdx.x * FINISH_CHANNELS + column;
  Moments own{0, 0, 0};
  for (int group = line; group < p.groups && channel < p.channels; group += FINISH_LINES) {
    const float* partial = p.partial + int64_t(group) * 2 * p.channels + channel;
    own.merge({float(rows_of_group(p, BATCH_NORM_THREADS / p.columns, group)), partial[0], partial[p.channels]});
  }
  shared[threadIdx.x] = own;
  __syncthreads();
  for (int half = FINISH_LINES / 2; half > 0; half /= 2) {
    if (line < half) shared[threadIdx.x].merge(shared[threadIdx.x + half * FINISH_CHANNELS]);
    __syncthreads();
  }
  if (line == 0 && channel < p.channels) {
    p.first[channel] = shared[threadIdx.x].mean;
    p.second[channel] = relu(shared[threadIdx.x].squares) / shared[threadIdx.x].count;  // rounding may leave less than zero
  }
}

// out = (x - mean) weight / sqrt(var + eps) + bias + residual, to which `function` is applied, VECTOR values at a time.
template <class T, int VECTOR, class Function>
__device__ __forceinline__ void bn_apply(const BatchNormParams& p, Function&& function) {
  const RowWalk<VECTOR> walk(p);
  if (!walk.inside) return;
  const Channels<VECTOR> mean(p.mean, walk.channel, true, 0), var(p.var, walk.channel, true, 0);
  const Channels<VECTOR> weight(p.weight, walk.channel, true, 1), bias(p.bias, walk.channel, true, 0);
  float scale[VECTOR];
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) scale[k] = weight.v[k] * inverse_deviation(var.v[k], p.eps);
  for (int64_t row = walk.row; row < p.rows; row += walk.row_step) {
    const int64_t at = row * p.channels + walk.channel;
    auto y = Elements<T, VECTOR>::load(p.x, at);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) y.v[k] = __fmaf_rn(y.v[k] - mean.v[k], scale[k], bias.v[k]);
    if (p.residual != nullptr) {
      const auto residual = Elements<T, VECTOR>::load(p.residual, at);
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) y.v[k] += residual.v[k];
    }
    function(y.v);
    y.store(p.out, at);
  }
}

template <class T, int VECTOR>
__device__ __forceinline__ void bn_apply_fwd(const BatchNormParams& p) {
  bn_apply<T, VECTOR>(p, [&](float (&v)[VECTOR]) {
    if (p.activation == Activation::relu) {
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) v[k] = relu(v[k]);
    }
  });
}

// Any other function. A kernel of its own: the registers that it takes would leave fewer threads to the passes of training.
template <class T, int VECTOR>
__device__ __forceinline__ void bn_apply_activated_fwd(const BatchNormParams& p) {
  bn_apply<T, VECTOR>(p, [&](float (&v)[VECTOR]) {
    overflow<T>(v);
    activate(p.activation, p.slope, v);
  });
}

// g = dy through ReLU's mask, kept in p.masked if that is given.
template <class T, int VECTOR>
__device__ __forceinline__ Elements<T, VECTOR> gradient(const BatchNormParams& p, int64_t at) {
  auto g = Elements<T, VECTOR>::load(p.dy, at);
  if (p.y != nullptr) {
    const auto y = Elements<T, VECTOR>::load(p.y, at);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) g.v[k] = masked_gradient(g.v[k], y.v[k]);
  }
  if (p.masked != nullptr) g.store(p.masked, at);
  return g;
}

// The block's part of dbias = sum of g and dweight = sum of g (x - mean) / sqrt(var + eps).
template <class T, int VECTOR>
__device__ __forceinline__ void bn_reduce_bwd(const BatchNormParams& p) {
  __shared__ float shared[BATCH_NORM_THREADS];
  const RowWalk<VECTOR> walk(p);
  const Channels<VECTOR> mean(p.mean, walk.channel, walk.inside, 0);
  float dbias[VECTOR] = {}, dweight[VECTOR] = {};
  for (int64_t row = walk.row; walk.inside && row < p.rows; row += walk.row_step) {
    const int64_t at = row * p.channels + walk.channel;
    const auto g = gradient<T, VECTOR>(p, at), x = Elements<T, VECTOR>::load(p.x, at);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) dbias[k] += g.v[k], dweight[k] = __fmaf_rn(g.v[k], x.v[k] - mean.v[k], dweight[k]);
  }
  sum_over_lines(dbias, p.columns, walk.lines, shared);
  sum_over_lines(dweight, p.columns, walk.lines, shared);
  if (walk.line > 0 || !walk.inside) return;
  float* partial = p.partial + int64_t(blockIdx.y) * 2 * p.channels + walk.channel;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) partial[k] = dbias[k], partial[p.channels + k] = dweight[k];
}

__device__ __forceinline__ void bn_reduce_bwd_finish(const BatchNormParams& p) {
  __shared__ float shared[BATCH_NORM_THREADS];
  const int column = threadIdx.x % FINISH_CHANNELS, line = threadIdx.x / FINISH_CHANNELS;
  const int channel = blockIdx.x * FINISH_CHANNELS + column;
  float sums[2] = {};
  for (int group = line; group < p.groups && channel < p.channels; group += FINISH_LINES) {
    const float* partial = p.partial + int64_t(group) * 2 * p.channels + channel;
    sums[0] += partial[0], sums[1] += partial[p.channels];
  }
  sum_over_lines(sums, FINISH_CHANNELS, FINISH_LINES, shared);
  if (line > 0 || channel >= p.channels) return;
  p.first[channel] = sums[1] * inverse_deviation(p.var[channel], p.eps);
  p.second[channel] = sums[0];
}

// out = dx = weight / sqrt(var + eps) (g - dbias / count - xhat dweight / count); without batch statistics only g
// counts.
template <class T, int VECTOR>
__device__ __forceinline__ void bn_apply_bwd(const BatchNormParams& p) {
  const RowWalk<VECTOR> walk(p);
  if (!walk.inside) return;
  const Channels<VECTOR> mean(p.mean, walk.channel, true, 0), var(p.var, walk.channel, true, 0);
  const Channels<VECTOR> weight(p.weight, walk.channel, true, 1);
  const Channels<VECTOR> dweight(p.dweight, walk.channel, true, 0), dbias(p.dbias, walk.channel, true, 0);
  float scale[VECTOR], slope[VECTOR], offset[VECTOR];
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    const float inverse = inverse_deviation(var.v[k], p.eps);
    scale[k] = weight.v[k] * inverse;
    slope[k] = dweight.v[k] * p.inverse_count * inverse, offset[k] = dbias.v[k] * p.inverse_count;
  }
  for (int64_t row = walk.row; row < p.rows; row += walk.row_step) {
    const int64_t at = row * p.channels + walk.channel;
    auto dx = gradient<T, VECTOR>(p, at);
    if (p.x != nullptr) {
      const auto x = Elements<T, VECTOR>::load(p.x, at);
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) dx.v[k] = dx.v[k] - offset[k] - (x.v[k] - mean.v[k]) * slope[k];
    }
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) dx.v[k] *= scale[k];
    dx.store(p.out, at);
  }
}

// out = combine(a, b), elements in any order, the same for the three; 16 bytes a thread, the rest by element.
template <class T, class Combine>
__device__ __forceinline__ void elementwise(const AddReluParams& p, Combine&& combine) {
  constexpr int VECTOR = Vector16<T>::COUNT;
  const int64_t vectors = p.count / VECTOR, thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const auto store = [&](auto a, auto b, int64_t at) {
#pragma unroll
    for (int k = 0; k < int(sizeof(a.v) / sizeof(float)); ++k) a.v[k] = combine(a.v[k], b.v[k]);
    a.store(p.out, at);
  };
  for (int64_t i = thread; i < vectors; i += threads)
    store(Elements<T, VECTOR>::load(p.a, i * VECTOR), Elements<T, VECTOR>::load(p.b, i * VECTOR), i * VECTOR);
  for (int64_t i = vectors * VECTOR + thread; i < p.count; i += threads)
    store(Elements<T, 1>::load(p.a, i), Elements<T, 1>::load(p.b, i), i);
}

template <class T>
__device__ __forceinline__ void add_relu_fwd(const AddReluParams& p) {
  elementwise<T>(p, [](float x, float residual) { return relu(x + residual); });
}

template <class T>
__device__ __forceinline__ void add_relu_bwd(const AddReluParams& p) {
  elementwise<T>(p, [](float dy, float y) { return masked_gradient(dy, y); });
}

}  // namespace resnet_fused
