// Operators of a convolution in training: its result and its two gradients. Kernels are square. Weights change with every step:
// they come as they are, float32 or in x's dtype, and are packed for one call. resnet_fused/backends/cpu_conv.py is the caller.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "activations.h"
#include "bindings.h"
#include "runtime.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As check_cpu_activations; float16 is trained by stock alone.
void check_trained(const Tensor& t, const char* name) {
  RF_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, name,
           " must be float32 or bfloat16; convert it with .to().");
  check_cpu_activations(t, name);
}

void check_training(const Tensor& x, const char* name, const Tensor& weight, const PackParams& packing, int64_t channels,
                    int64_t stride, int64_t pad) {
  RF_CHECK(packing.source != DType::float16, "weight must be float32 or bfloat16; convert it with .to().");
  RF_CHECK(x.scalar_type() == ScalarType::BFloat16 || packing.source == DType::float32, "weight is bfloat16 where ", name,
           " is float32; convert one with .to().");
  RF_CHECK(x.size(1) == channels, name, " has ", x.size(1), " channels, where weight asks for ", channels, ".");
  RF_CHECK(weight.size(2) == weight.size(3), "weight has a kernel of ", weight.size(2), " x ", weight.size(3),
           "; it must be square.");
  RF_CHECK(stride > 0 && pad >= 0 && pad < weight.size(2), "stride is ", stride, " and pad ", pad,
           "; stride must be positive, and pad not negative and less than the kernel.");
}

// That direct sums serve this in training, where weights are rounded as stock's are: float32, or bfloat16 in pairs.
void check_direct(DType dtype, int64_t channels) {
  RF_CHECK(dtype == direct_weights(dtype, channels),
           "direct bfloat16 convolutions in training need a CPU with AVX512_BF16 and an even number of input channels.");
}

// Packs weights into `scratch`. `order` as in PackParams.
const void* packed_for_a_call(Scratch& scratch, PackParams packing, DType dtype, bool winograd, const int64_t* order) {
  const int64_t results = order != nullptr ? packing.in_channels : packing.out_channels;
  const int64_t summed = order != nullptr ? packing.out_channels : packing.in_channels;
  packing.packed = scratch.take<char>(padded_channels(results) * packing.taps * summed * (dtype == DType::bfloat16 ? 2 : 4));
  packing.destination = dtype, packing.winograd = winograd, packing.order = order;
  kernels().pack(packing);
  return packing.packed;
}

// The same of a grouped convolution, whose packed weights are float32.
const void* packed_groups_for_a_call(Scratch& scratch, PackParams packing, int64_t groups, int64_t kernel) {
  const int64_t channels = groups * packing.in_channels;
  packing.packed = scratch.take<float>(kernels().grouped_size(groups, channels, packing.out_channels, packing.taps));
  kernels().pack_grouped(packing, groups, kernel);
  return packing.packed;
}

const float* no_shift(Scratch& scratch, int64_t channels) {
  const int64_t padded = padded_channels(channels);
  float* bias = scratch.take<float>(padded);
  std::fill(bias, bias + padded, 0.0f);
  return bias;
}

// conv(x, w); `plan` as run_conv takes it.
Tensor training_conv(Tensor x, Tensor weight, int64_t stride, int64_t pad, std::vector<int64_t> plan, int64_t groups) {
  check_trained(x, "x");
  const PackParams packing = pack_params(weight);
  RF_CHECK(groups > 0 && packing.out_channels % groups == 0, "groups is ", groups, "; it must divide the weight's ",
           packing.out_channels, " output channels.");
  check_training(x, "x", weight, packing, groups * packing.in_channels, stride, pad);
  const int64_t kernel = weight.size(2);
  ConvParams p{};
  p.x = x.const_data_ptr();
  p.batch = x.size(0), p.in_channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.out_channels = packing.out_channels, p.groups = groups;
  p.source = p.weight = dtype_of(x);
  set_geometry(p, {kernel, kernel, stride, stride, pad, pad, 1, 1});
  check_conv(p, plan);
  if (plan.empty() && groups == 1) check_direct(p.source, p.in_channels);
  Tensor y = new_activations(x, p.batch, p.out_channels, p.out_height, p.out_width);
  p.y = y.mutable_data_ptr();
  if (p.batch == 0) return y;
  Scratch scratch;
  p.weights = groups == 1 ? packed_for_a_call(scratch, packing, p.source, !plan.empty(), nullptr)
                          : packed_groups_for_a_call(scratch, packing, groups, kernel);
  p.bias = no_shift(scratch, p.out_channels);
  run_conv(p, plan);
  return y;
}

// Gradient of x, which is of this height and width; `plan` as run_conv takes it, for the convolution of dy (stride 1) that it
// is, or empty.
Tensor input_gradient(Tensor dy, Tensor weight, int64_t height, int64_t width, int64_t stride, int64_t pad,
                      std::vector<int64_t> plan) {
  check_trained(dy, "dy");
  const PackParams packing = pack_params(weight);
  check_training(dy, "dy", weight, packing, packing.out_channels, stride, pad);
  const int64_t kernel = weight.size(2);
  InputGradientParams p{};
  p.dy = dy.const_data_ptr();
  p.batch = dy.size(0), p.height = height, p.width = width, p.in_channels = packing.in_channels;
  p.out_channels = packing.out_channels, p.out_height = dy.size(2), p.out_width = dy.size(3);
  p.kernel = kernel, p.stride = stride, p.pad = pad;
  p.dtype = dtype_of(dy);
  RF_CHECK(p.out_height > 0 && p.out_width > 0 && p.out_height == result_size(height, kernel, stride, pad) &&
               p.out_width == result_size(width, kernel, stride, pad),
           "dy doesn't have the size of the result of this convolution on ", height, " x ", width, " pixels.");
  RF_CHECK(plan.empty() || stride == 1, "plan is for stride 1, not ", stride, ".");
  ConvParams conv{};
  conv.x = p.dy;
  conv.batch = p.batch, conv.in_channels = p.out_channels, conv.height = p.out_height, conv.width = p.out_width;
  conv.out_channels = p.in_channels;
  conv.source = conv.weight = p.dtype;
  if (plan.empty()) check_direct(conv.source, conv.in_channels);
  Tensor dx = new_activations(dy, p.batch, p.in_channels, height, width);
  if (p.batch == 0) return dx;
  p.dx = conv.y = dx.mutable_data_ptr();
  std::vector<int64_t> order;
  for_each_phase(kernel, stride, pad, [&](int64_t, int64_t, auto&& positions) {
    positions([&](int64_t kh, int64_t kw) { order.push_back(kh * kernel + kw); });
  });
  Scratch scratch;
  p.weights = conv.weights = packed_for_a_call(scratch, packing, p.dtype, !plan.empty(), order.data());
  if (plan.empty() && (kernel > 1 || stride > 1)) {
    direct_kernels(p.dtype, p.dtype).input_gradient(p);
    return dx;
  }
  conv.bias = no_shift(scratch, p.in_channels);
  set_geometry(conv, {kernel, kernel, 1, 1, kernel - 1 - pad, kernel - 1 - pad, 1, 1});
  run_conv(conv, plan);
  return dx;
}

// Gradient of the weights of conv(x, w) with a square kernel, as float32 [out_channels][kernel][kernel][in_channels].
Tensor weight_gradient(Tensor x, Tensor dy, int64_t kernel, int64_t stride, int64_t pad, bool winograd) {
  check_trained(x, "x");
  check_trained(dy, "dy");
  RF_CHECK(x.scalar_type() == dy.scalar_type(), "x and dy differ in dtype.");
  WeightGradientParams p{};
  p.x = x.const_data_ptr(), p.dy = dy.const_data_ptr();
  p.batch = x.size(0), p.in_channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.out_channels = dy.size(1), p.out_height = dy.size(2), p.out_width = dy.size(3);
  p.kernel = kernel, p.stride = stride, p.pad = pad;
  p.dtype = dtype_of(x);
  RF_CHECK(kernel > 0 && stride > 0 && pad >= 0, "kernel and stride must be positive, pad not negative.");
  RF_CHECK(dy.size(0) == p.batch && p.out_height == result_size(p.height, kernel, stride, pad) &&
               p.out_width == result_size(p.width, kernel, stride, pad) && dy.numel() > 0 && x.numel() > 0,
           "dy doesn't have the shape of this convolution's result, or is empty.");
  RF_CHECK(!winograd || (kernel == 3 && stride == 1 && pad == 1), "Winograd serves 3 x 3 kernels of stride and padding 1.");
  RF_CHECK(winograd || p.dtype == DType::float32 || has_avx512_bf16(),
           "the gradient of weights in bfloat16 needs a CPU with AVX512_BF16, or Winograd.");
  Tensor dweight = new_weight_gradient(x, p.out_channels, kernel, p.in_channels);
  p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  winograd ? kernels().weight_gradient_winograd(p) : direct_kernels(p.dtype, p.dtype).weight_gradient(p);
  return dweight;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("training_conv(Tensor x, Tensor weight, int stride, int pad, int[] plan, int groups=1) -> Tensor");
  m.def("input_gradient(Tensor dy, Tensor weight, int height, int width, int stride, int pad, int[] plan) -> Tensor");
  m.def("weight_gradient(Tensor x, Tensor dy, int kernel, int stride, int pad, bool winograd) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("training_conv", TORCH_BOX(&training_conv));
  m.impl("input_gradient", TORCH_BOX(&input_gradient));
  m.impl("weight_gradient", TORCH_BOX(&weight_gradient));
}
