// What one launch of the stem's kernel is told. Plain C++: the planner fills it on the host, the kernel reads it.
#pragma once

#include <cstdint>

namespace resnet_fused {

// A block of threads goes down a strip of an image, a row of the pool's result a step; blockIdx.x is the image and blockIdx.y
// the strip. Strides are in bytes.
struct StemParams {
  const void* x;       // [N, 3, height, width], or [N, height, width, 3]
  const void* weight;  // as lanes hold it, see stem.cuh
  const float* bias;   // of CHANNELS
  void* y;             // [N, pooled_height, pooled_width, CHANNELS]
  int64_t image_stride, channel_stride, row_stride;
  int32_t height, width;
  int32_t conv_height, conv_width;
  int32_t pooled_height, pooled_width;
  int32_t rows_per_strip;  // of the pool's result
  int32_t tiles;           // of TILE pixels of the convolution, of a row
  int32_t row_pitch;       // bytes between rows of x in shared memory
  int32_t reserved;        // the struct is whole words of 8 bytes
};

}  // namespace resnet_fused
