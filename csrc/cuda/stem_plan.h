// The launch of the stem with its pool, planned by pure arithmetic, as conv2d_plan.h plans a convolution's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"
#include "stem_params.h"
#include "stem_tiles.h"

namespace resnet_fused {

// y = max_pool2d(relu(conv2d(x, weight) + bias)), x [batch, 3, height, width], a filter of 7x7 with stride 2 and padding 3, a
// pool of 3x3 with stride 2 and padding 1; y channels_last.
struct StemProblem {
  int64_t batch, height, width, out_channels;
  ElementType type;

  int64_t conv_height() const { return (height - 1) / 2 + 1; }
  int64_t conv_width() const { return (width - 1) / 2 + 1; }
  int64_t pooled_height() const { return (conv_height() - 1) / 2 + 1; }
  int64_t pooled_width() const { return (conv_width() - 1) / 2 + 1; }
};

// Strides of x in elements. The channels' is no matter where they are interleaved.
struct StemStrides {
  int64_t image, channel, row;
};

struct StemPointers {
  const void *x, *weight, *bias;
  void* y;
};

struct StemPlan {
  KernelLaunch launch;
  StemParams params;  // without the pointers; see with_pointers
};

// The plan without pointers; `rows` asks for strips of so many rows of the result, or is 0. Throws std::invalid_argument with
// the reason where no kernel serves the problem.
StemPlan plan_stem(const StemProblem& problem, StemInput input, const StemStrides& strides, const DeviceProperties& device,
                   int64_t rows);

// Rows of the result that strips may have, the most promising first.
std::vector<int64_t> stem_rows(const StemProblem& problem, StemInput input, const DeviceProperties& device);

StemParams with_pointers(const StemPlan& plan, const StemPointers& pointers);

}  // namespace resnet_fused
