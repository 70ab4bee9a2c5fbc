// Batch norm: what the operators hand to the kernels, the same for every instruction set.
#pragma once

#include <cstdint>

#include "params.h"

namespace resnet_fused::cpu {

// Activations of one layer, dense. As rows: (pixel of the batch, channel), which is channels_last. As planes: (image, channel,
// pixel), which is PyTorch's contiguous format.
struct BatchNormShape {
  int64_t images, channels, pixels;  // pixels: height x width
  bool rows;
  DType dtype;  // of all activations and their gradients; statistics, parameters and their gradients are float32

  int64_t per_channel() const { return images * pixels; }
};

// Null where the op has no such tensor.
struct BatchNormTensors {
  const void* x = nullptr;
  const void* residual = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;  // the result after ReLU, whose sign is ReLU's mask
  const float* mean = nullptr;
  const float* var = nullptr;  // biased
  const float* weight = nullptr;
  const float* bias = nullptr;
  const float* dweight = nullptr;
  const float* dbias = nullptr;
  double eps = 0;
  double count = 0;  // values of a channel, over all processes
  bool relu = false;
};

// The kernels of one instruction set. Each writes all of its outputs.
struct BatchNormKernels {
  // mean and biased variance of each channel.
  void (*statistics)(const BatchNormShape&, const BatchNormTensors&, float* mean, float* var);
  // out = act((x - mean) * weight / sqrt(var + eps) + bias + residual)
  void (*apply)(const BatchNormShape&, const BatchNormTensors&, void* out);
  // g = dy where y is positive or NaN; dbias = sum of g, dweight = sum of g * (x - mean) / sqrt(var + eps); masked = g unless
  // null.
  void (*backward_reduce)(const BatchNormShape&, const BatchNormTensors&, void* masked, float* dweight, float* dbias);
  // dx from g, and masked = g unless null. Without dweight and dbias the statistics count as constants.
  void (*backward_apply)(const BatchNormShape&, const BatchNormTensors&, void* masked, void* dx);
};

}  // namespace resnet_fused::cpu
