// What one launch of a batch-norm or add_relu kernel is told. Plain C++: the planner fills it on the host.
#pragma once

#include <cstdint>

#include "activation.h"

namespace resnet_fused {

// Activations are [rows, channels], channels_last: a row is a pixel. Unused pointers are null.
struct BatchNormParams {
  const void *x, *residual, *dy, *y;  // y: a saved result, whose sign is ReLU's mask
  void *out, *masked;
  const float *mean, *var, *weight, *bias, *dweight, *dbias;  // [channels]
  float* partial;                                             // [groups, 2, channels]
  float *first, *second;                                      // results, [channels]
  int64_t rows;
  int32_t channels;
  int32_t columns;  // threads of a block along the channels, a power of two
  int32_t groups;   // blocks along the rows
  float eps;
  float inverse_count;  // 1 / values of a channel; 0 where statistics are constants
  Activation activation;
  float slope;  // of a leaky ReLU, below zero
};

// Forward: a = x, b = residual, out = y. Backward: a = dy, b = y, out = dx = dresidual.
struct AddReluParams {
  const void *a, *b;
  void* out;
  int64_t count;  // elements
};

}  // namespace resnet_fused
