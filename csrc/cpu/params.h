// What the operators hand to the kernels: plain structs, the same for every instruction set.
#pragma once

#include <atomic>
#include <cstdint>

namespace resnet_fused::cpu {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

enum class DType : uint8_t { float32, bfloat16, float16 };

// The function at the end of an epilogue, as torch.nn.functional names it. GELU by the error function isn't among them: stock's
// is NaN at infinity in float32 with AVX-512, and infinity in float64.
enum class ActivationFunction : uint8_t {
  none,
  relu,
  relu6,
  leaky_relu,
  sigmoid,
  silu,
  hardsigmoid,
  hardswish,
  gelu_tanh,
};

struct Nonlinearity {
  ActivationFunction function = ActivationFunction::none;
  float slope = 0;  // of leaky_relu, below zero

  bool is(ActivationFunction other) const { return function == other; }
};

constexpr Nonlinearity NO_NONLINEARITY{}, RELU{ActivationFunction::relu};

// Set by a kernel, on any of its threads, that can't give stock's answer for the values of x: y is then of no use (uneven.h).
using Declined = std::atomic<bool>;

// Notes whether a kernel's part of x can be served. `declined` is null where nobody asks.
inline void note(bool served, Declined* declined) {
  if (!served && declined != nullptr) declined->store(true, std::memory_order_relaxed);
}

// y = act(conv(x, w) + bias + residual). x, residual and y are NHWC (channels_last) of one dtype, dense.
struct ConvParams {
  const void* x;
  const void* weights;   // packed panels, see pack.h
  bool transformed;      // weights are Winograd's U in float32, see winograd_stages.h
  const float* bias;     // padded with zeros to whole panels
  const void* residual;  // shape of y, or null
  void* y;
  Declined* declined;  // or null
  int64_t batch, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t groups = 1;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Nonlinearity nonlinearity;
  DType source;  // of x, residual and y
  DType weight;  // of the weights as they are packed
};

// Weights to packed panels: see pack.h.
struct PackParams {
  const void* weights;  // [out_channels][taps][in_channels]
  void* packed;
  int64_t out_channels, in_channels, taps;
  DType source, destination;  // of the weights, and of what is packed of them
  bool winograd;              // for Winograd, not for the direct kernels
  const int64_t* order;       // turned round: the kernel positions as they are to follow each other; null: as they are
};

// Runs body(row, column, positions) for each phase of a strided convolution's input, row and column being a pixel's in its
// cell of stride x stride; positions(visit) runs visit(kh, kw) for the kernel positions that pixels of that phase meet, the
// last ones first. See input_gradient.h.
template <class Body>
void for_each_phase(int64_t kernel, int64_t stride, int64_t pad, Body&& body) {
  const auto last = [&](int64_t at) {
    return kernel - 1 - (kernel - 1 - at - pad + stride * (pad + 1)) % stride;
  };
  for (int64_t row = 0; row < stride; ++row) {
    for (int64_t column = 0; column < stride; ++column) {
      body(row, column, [&](auto&& visit) {
        for (int64_t kh = last(row); kh >= 0; kh -= stride) {
          for (int64_t kw = last(column); kw >= 0; kw -= stride) visit(kh, kw);
        }
      });
    }
  }
}

// Gradient of the input of a convolution, as in WeightGradientParams.
struct InputGradientParams {
  const void* dy;       // NHWC, like dx
  const void* weights;  // packed turned round, kernel positions phase by phase
  void* dx;
  int64_t batch, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel, stride, pad;
  DType dtype;  // of dy, dx and the packed weights
};

// Gradient of the weights of a convolution of equal kernel, stride and padding in height and width, and no dilation.
struct WeightGradientParams {
  const void* x;  // NHWC, like dy
  const void* dy;
  float* dweight;  // [out_channels][kernel_h][kernel_w][in_channels]
  int64_t batch, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel, stride, pad;
  DType dtype;  // of x and dy
};

// How a Winograd convolution is cut up; see docs/cpu-kernels.md. Chosen by resnet_fused/backends/cpu/plan.py.
struct WinogradPlan {
  int64_t output_tile;    // m of the m x m results of a tile: 2 or 4 for stride 1, 5 for stride 2
  int64_t tiles;          // tiles that go through the stages together
  int64_t panels;         // output-channel panels multiplied before their output transform (by_tiles)
  int64_t channel_chunk;  // input channels whose weights are transformed at once (by_panels)
  bool by_panels;         // split the work over output channels (deep layers), not over tiles
};

// One convolution of a block: packed (or transformed) weights, bias padded to whole panels.
struct LayerParams {
  const void* weights;
  bool transformed;
  const float* bias;
  int64_t in_channels, out_channels;
};

// A residual block of stride 1, computed strip by strip: y = relu(layers(x) + shortcut(x)). All tensors have one dtype; in
// bfloat16 the weights of 1 x 1 layers are packed in pairs.
struct BlockParams {
  const void* x;
  void* y;
  Declined* declined;
  int64_t batch, height, width;
  LayerParams layers[3];  // basic block: two 3 x 3; bottleneck: 1 x 1, 3 x 3, 1 x 1
  LayerParams shortcut;   // 1 x 1; weights null: the identity
  int64_t strip;          // rows of Winograd tiles that go through the block together
  int64_t parts;          // parts of an image, so that a small batch keeps all threads busy
  int64_t panels;         // panels multiplied before their output transform
};

// 7 x 7 convolution of stride 2 and padding 3 on few channels, + bias, ReLU, and a 3 x 3 max-pool of stride 2 and padding 1.
struct StemParams {
  const void* x;  // any strides
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  const float* weights;  // transformed: [panel][point][4 in_channels][PANEL]
  const float* bias;
  void* y;  // NHWC
  Declined* declined;
  int64_t batch, height, width, in_channels, out_channels;
  bool pool;
  Nonlinearity nonlinearity;
  DType dtype;  // of x and y

  int64_t conv_height() const { return (height + 1) / 2; }
  int64_t conv_width() const { return (width + 1) / 2; }
  int64_t out_height() const { return pool ? (conv_height() + 1) / 2 : conv_height(); }
  int64_t out_width() const { return pool ? (conv_width() + 1) / 2 : conv_width(); }
};

// One of the tensors that are concatenated along channels: NHWC, with so many channels.
struct PassSource {
  const void* x;
  int64_t channels;
};

// y = act((x scale + shift) gate + residual) in one pass: x NHWC, or several tensors side by side, which are concatenated.
struct PassParams {
  const PassSource* sources;
  int64_t source_count;
  const float *scale, *shift;  // (channels), or both null
  const void* gate;            // (batch, channels), or null
  const void* residual;        // shape of y, or null
  void* y;                     // NHWC; may be the one source, or the residual
  int64_t batch, pixels, channels;
  Nonlinearity nonlinearity;
  DType dtype;  // of x, gate, residual and y
};

// y = mean of x over its pixels; x NHWC, y (batch, channels).
struct AveragePoolParams {
  const void* x;
  void* y;
  int64_t batch, height, width, channels;
  DType dtype;
};

}  // namespace resnet_fused::cpu
