// What one launch of a whole block's kernel is told. Plain C++: the planner fills it on the host, the kernel reads it.
#pragma once

#include <cstdint>

namespace resnet_fused {

// An image is cut into strips of its full width. A block of threads goes down its strip, `rows` rows a step; blockIdx.x is the
// image and blockIdx.y the strip. What the
// first layer gives lies in a ring of ring_rows = rows + 2 rows in shared memory, as the next layer's 3x3 window needs it.
struct BlockParams {
  const void* x;          // [N, height, width, channels]
  const void* weight;     // all layers' fragments in the order in which they are used, in chunks of CHUNK_BYTES
  const float* bias;      // of one layer after the other, the projection's last
  void* y;                // [N, height, width, out_channels]
  int32_t pixels, width;  // of an image
  int32_t rows;           // of a step
  int32_t steps;          // of an image
  int32_t steps_per_strip;
  int32_t ring_rows;
  int32_t ring_pitch;  // bytes between rows of the ring
  int32_t reserved;    // the struct is whole words of 8 bytes
};

}  // namespace resnet_fused
