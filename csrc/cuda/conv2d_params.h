// What one launch of a convolution kernel is told. Plain C++: the planner fills it on the host, the kernel reads it.
#pragma once

#include <cstdint>

#include "activation.h"

#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RF_HOST_DEVICE inline
#endif

namespace resnet_fused {

// Division of 0 <= n < 2^31 by a divisor fixed on the host: one multiplication and one bias.
// Source: Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
struct FastDivisor {
  uint32_t divisor, multiplier, bias;

  static FastDivisor of(uint32_t divisor) {
    uint32_t bias = 0;
    while ((uint64_t{1} << bias) < divisor) ++bias;
    const uint64_t multiplier = divisor == 1 ? 0 : ((uint64_t{1} << (31 + bias)) + divisor - 1) / divisor;
    return {divisor, static_cast<uint32_t>(multiplier), bias == 0 ? 0 : bias - 1};
  }

  RF_HOST_DEVICE uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32);
#endif
    return divisor == 1 ? n : high >> bias;
  }
};

// Runs that make no whole 16 bytes have this many zeros in front in the packed weight: it lets the stem's kernel read x
// in aligned pairs.
constexpr int32_t RUN_LEAD = 1;

// The filter is walked as filter_rows x runs, each run contiguous in x and in the packed weight: a run is the channels
// of one filter position, or, where they make no whole 16 bytes, a whole filter row. The product's k is all runs in
// order, each padded to whole steps of the main loop.
struct Conv2dParams {
  const void* x;                    // [N, height, width, channels]
  const void* weight;               // [out_channels, filter_rows, runs, run_length], zeros where a run was padded
  const float* bias;                // [out_channels]
  const void* residual;             // [N, P, Q, out_channels] or null
  void* y;                          // [N, P, Q, out_channels]
  float* partial;                   // [splits, N P Q, partial_stride], or null: no split of k
  int64_t image_stride;             // bytes between images of x
  int64_t row_stride;               // bytes between rows of x
  int64_t run_delta;                // bytes in x from the last step of a run to the first of the next
  int64_t row_delta;                // the same, from the last run of a filter row to the first of the next row
  int64_t weight_stride;            // bytes between output channels of the packed weight
  int32_t weight_delta;             // bytes in the weight from the last step of a run to the first of the next
  int32_t pixel_stride;             // bytes between pixels of x
  int32_t height, width, channels;  // of x
  int32_t out_pixels;               // N P Q, the rows of the product
  int32_t out_channels;             // its columns
  int32_t partial_stride;           // floats between rows of partial
  int32_t filter_rows, runs;
  int32_t run_length;  // elements, whole 16 bytes
  int32_t run_pixels;  // pixels of x in a run
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t steps_per_run;  // of the main loop
  int32_t steps;          // of all runs
  int32_t steps_per_split, splits;
  int32_t tiles_n,
      group_shift;     // grid.x walks 2^group_shift tiles of channels, then down the pixels; grid.y the groups
  int32_t vectorised;  // whether out_channels make whole 16 bytes
  Activation activation;
  float slope;             // of a leaky ReLU, below zero
  FastDivisor image, row;  // by P Q and by Q
  FastDivisor quads;       // by partial_stride / 4
};

}  // namespace resnet_fused
