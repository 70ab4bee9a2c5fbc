// Operators of the namespace resnet_fused_cpu, on PyTorch's stable ABI, which the backend "cpu" calls; the public operators,
// with fake implementations and autograd, are Python's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "activations.h"
#include "bindings.h"
#include "kernels.h"
#include "plan.h"
#include "runtime.h"

namespace resnet_fused::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t padded_channels(int64_t channels) {
  const int64_t panel = 2 * kernels().lanes;
  return (channels + panel - 1) / panel * panel;
}

bool has_strides(const Tensor& t, const std::array<int64_t, 4>& strides) {
  for (int64_t d = 0; d < 4; ++d) {
    // The stride of a dimension of size 1 means nothing.
    if (t.size(d) > 1 && t.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

bool is_channels_last(const Tensor& t) {
  return has_strides(t, {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)});
}

static void check_channels_last(const Tensor& t, const char* name) {
  RF_CHECK(is_channels_last(t), name, " is not channels_last; call .contiguous(memory_format=torch.channels_last).");
}

void check_dtype(ScalarType dtype, const char* name) {
  RF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
           " must be float32, bfloat16 or float16; convert it with .to().");
  RF_CHECK(dtype != ScalarType::Half || has_float16(), name,
           " is float16, which this CPU can't convert (F16C); convert it with .to().");
}

void check_cpu_activations(const Tensor& t, const char* name) {
  RF_CHECK(t.is_cpu(), name, " is not on the CPU; move it with .cpu().");
  RF_CHECK(t.dim() == 4, name, " has ", t.dim(), " dimensions; it must have four, (N, C, H, W).");
  check_dtype(t.scalar_type(), name);
  check_channels_last(t, name);
}

int64_t result_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
  const int64_t room = size + 2 * pad - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

void set_geometry(ConvParams& p, const std::vector<int64_t>& geometry) {
  RF_CHECK(geometry.size() == 8, "geometry has ", geometry.size(),
           " entries; it must hold kernel, stride, padding and dilation, two each.");
  p.kernel_h = geometry[0], p.kernel_w = geometry[1], p.stride_h = geometry[2], p.stride_w = geometry[3];
  p.pad_h = geometry[4], p.pad_w = geometry[5], p.dilation_h = geometry[6], p.dilation_w = geometry[7];
  p.out_height = result_size(p.height, p.dilation_h * (p.kernel_h - 1) + 1, p.stride_h, p.pad_h);
  p.out_width = result_size(p.width, p.dilation_w * (p.kernel_w - 1) + 1, p.stride_w, p.pad_w);
  RF_CHECK(p.out_height > 0 && p.out_width > 0, "x is smaller than the kernel: the result would be empty.");
}

Nonlinearity nonlinearity(const std::string& activation, double slope) {
  // In the order of ActivationFunction.
  static const char* const NAMES[] = {"none", "relu",        "relu6",     "leaky_relu", "sigmoid",
                                      "silu", "hardsigmoid", "hardswish", "gelu_tanh"};
  for (size_t i = 0; i < std::size(NAMES); ++i) {
    if (activation == NAMES[i]) return {static_cast<ActivationFunction>(i), static_cast<float>(slope)};
  }
  RF_CHECK(false, "activation is '", activation, "'; it must be one of ActivationFunction in csrc/cpu/params.h.");
  return {};
}

PackParams pack_params(const Tensor& weight) {
  RF_CHECK(weight.dim() == 4 && weight.is_cpu(), "weight must be a CPU tensor of shape (out_channels, in_channels, kh, kw).");
  PackParams p{};
  p.weights = weight.const_data_ptr();
  p.out_channels = weight.size(0), p.in_channels = weight.size(1), p.taps = weight.size(2) * weight.size(3);
  check_dtype(weight.scalar_type(), "weight");
  p.source = p.destination = dtype_of(weight);
  check_channels_last(weight, "weight");
  return p;
}

// That the kernel of grouped convolutions serves one.
static void check_grouped(const ConvParams& p, const std::vector<int64_t>& plan) {
  const bool depthwise = p.groups == p.in_channels && p.groups == p.out_channels;
  RF_CHECK(plan.empty(), "plan must be empty for a convolution of ", p.groups, " groups; Winograd serves one.");
  RF_CHECK(p.kernel_h == p.kernel_w && (p.kernel_h == 3 || (depthwise && (p.kernel_h == 5 || p.kernel_h == 7))),
           "a grouped convolution's kernel is ", p.kernel_h, " x ", p.kernel_w,
           "; it must be 3 x 3, or for depthwise ones 5 x 5 or 7 x 7.");
  RF_CHECK(p.stride_h == p.stride_w && (p.stride_h == 1 || p.stride_h == 2) && p.dilation_h == 1 && p.dilation_w == 1,
           "a grouped convolution needs one stride of 1 or 2, and no dilation.");
}

void check_conv(const ConvParams& p, const std::vector<int64_t>& plan) {
  if (p.groups != 1) {
    check_grouped(p, plan);
    return;
  }
  if (!plan.empty()) {
    const WinogradPlan how = winograd_plan(p, plan);
    RF_CHECK(!p.transformed || how.output_tile != 2,
             "plan's output tile is 2, but weights are transformed for another; give packed weights.");
    return;
  }
  RF_CHECK(!p.transformed, "weights are transformed for Winograd; give a plan, or packed weights.");
}

void run_conv(const ConvParams& p, const std::vector<int64_t>& plan) {
  if (p.groups != 1) {
    kernels().grouped(p);
    return;
  }
  if (!plan.empty()) {
    kernels().winograd(p, winograd_plan(p, plan));
    return;
  }
  if (p.kernel_h == 1 && p.kernel_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
    direct_kernels(p.source, p.in_channels).pointwise(p);
  } else {
    direct_kernels(p.source, p.in_channels).direct(p);
  }
}

std::optional<Tensor> stem(const Tensor& x, const Tensor& weights, const Tensor& bias, int64_t out_channels, bool pool,
                           const std::string& activation, double slope) {
  RF_CHECK(x.is_cpu() && x.dim() == 4, "x must be a CPU tensor of shape (N, C, H, W).");
  check_dtype(x.scalar_type(), "x");
  const Nonlinearity function = nonlinearity(activation, slope);
  RF_CHECK(!pool || function.is(ActivationFunction::relu), "the pool of a stem follows a ReLU.");
  const int64_t padded = padded_channels(out_channels);
  RF_CHECK(weights.scalar_type() == ScalarType::Float && weights.numel() == padded * 36 * 4 * x.size(1),
           "weights must be the float32 transformed weights of this stem.");
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == padded, "bias must be float32 with ", padded,
           " elements (whole panels).");
  StemParams p{};
  p.x = x.const_data_ptr();
  p.x_stride_n = x.stride(0), p.x_stride_c = x.stride(1), p.x_stride_h = x.stride(2), p.x_stride_w = x.stride(3);
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.batch = x.size(0), p.in_channels = x.size(1), p.height = x.size(2), p.width = x.size(3), p.out_channels = out_channels;
  p.pool = pool, p.dtype = dtype_of(x);
  p.nonlinearity = function;
  RF_CHECK(p.height > 0 && p.width > 0, "x has no pixels.");
  Tensor y = new_activations(x, p.batch, out_channels, p.out_height(), p.out_width());
  p.y = y.mutable_data_ptr();
  Declined declined{false};
  p.declined = &declined;
  if (p.batch > 0) kernels().stem(p);
  if (declined.load(std::memory_order_relaxed)) return std::nullopt;
  return y;
}

namespace {

// Packed weights of a convolution, as the direct kernels take them or as Winograd does. Those of the direct kernels are float32
// for float16, and where bfloat16 isn't multiplied in pairs.
Tensor pack(Tensor weight, bool winograd) {
  PackParams p = pack_params(weight);
  RF_CHECK(!winograd || (weight.size(2) == 3 && weight.size(3) == 3), "weight has a kernel of ", weight.size(2), " x ",
           weight.size(3), "; Winograd serves 3 x 3, pack it for the direct kernels.");
  if (!winograd) p.destination = direct_weights(p.source, p.in_channels);
  p.winograd = winograd;
  const std::array<int64_t, 1> size{padded_channels(p.out_channels) * p.taps * p.in_channels};
  Tensor packed =
      torch::stable::empty({size.data(), size.size()}, scalar_type_of(p.destination), std::nullopt, weight.device());
  advise_huge_pages(packed.mutable_data_ptr(), size[0] * static_cast<int64_t>(packed.element_size()));
  p.packed = packed.mutable_data_ptr();
  kernels().pack(p);
  return packed;
}

// Weights of a grouped convolution, (out_channels, in_channels / groups, kh, kw), as its kernel takes them: float32.
Tensor pack_grouped(Tensor weight, int64_t groups) {
  PackParams p = pack_params(weight);
  RF_CHECK(weight.numel() > 0, "weight is empty; a convolution needs channels and taps.");
  RF_CHECK(groups > 0 && p.out_channels % groups == 0, "groups is ", groups, "; it must divide the weight's ", p.out_channels,
           " output channels.");
  const int64_t kernel = weight.size(3);
  const std::array<int64_t, 1> size{kernels().grouped_size(groups, p.in_channels * groups, p.out_channels, p.taps)};
  Tensor packed = torch::stable::empty({size.data(), size.size()}, ScalarType::Float, std::nullopt, weight.device());
  p.packed = packed.mutable_data_ptr();
  kernels().pack_grouped(p, groups, kernel);
  return packed;
}

// Weights packed for Winograd, of a 3 x 3 convolution of stride 1 or 2, as it multiplies them: float32, about four times as large.
Tensor transform(Tensor packed, int64_t in_channels, int64_t out_channels, int64_t stride) {
  RF_CHECK(stride == 1 || stride == 2, "stride is ", stride, "; Winograd serves strides 1 and 2.");
  const int64_t wanted = padded_channels(out_channels) * 9 * in_channels;
  RF_CHECK(packed.numel() == wanted, "packed has ", packed.numel(), " elements, the packed weights of this convolution ",
           wanted, "; make it with resnet_fused_cpu::pack.");
  const std::array<int64_t, 1> size{kernels().transformed_size(in_channels, out_channels, stride)};
  Tensor u = torch::stable::empty({size.data(), size.size()}, ScalarType::Float, std::nullopt, packed.device());
  advise_huge_pages(u.mutable_data_ptr(), size[0] * static_cast<int64_t>(sizeof(float)));
  kernels().transform({packed.const_data_ptr(), false, nullptr, in_channels, out_channels}, stride, dtype_of(packed),
                      static_cast<float*>(u.mutable_data_ptr()));
  return u;
}

// The machine's multiply-add peak on the threads at hand, GFLOP/s: the best of a few measurements of some milliseconds.
double measure_peak(bool bfloat16) {
  const auto loop = direct_kernels(bfloat16 ? DType::bfloat16 : DType::float32, int64_t{2}).multiply_add_loop;
  const int64_t threads = thread_count();
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    std::atomic<int64_t> operations{0};
    const auto begin = std::chrono::steady_clock::now();
    parallel_units(threads, [&](int64_t, int64_t) {
      float sink = 0;
      operations += loop(int64_t{1} << 20, &sink);
      volatile float kept = sink;
      (void)kept;
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, static_cast<double>(operations) / seconds * 1e-9);
  }
  return best;
}

std::optional<Tensor> stem_of(Tensor x, Tensor weights, Tensor bias, int64_t out_channels, bool pool, std::string activation,
                              double slope) {
  return stem(x, weights, bias, out_channels, pool, activation, slope);
}

Tensor empty_activations(Tensor like) {
  RF_CHECK(like.is_cpu() && like.dim() == 4, "like must be a CPU tensor with four dimensions, (N, C, H, W).");
  return new_activations(like);
}

int64_t isa() { return static_cast<int64_t>(detected_isa()); }
int64_t set_isa_limit(int64_t highest) { return static_cast<int64_t>(limit_isa(static_cast<Isa>(highest))); }
bool avx512_bf16() { return has_avx512_bf16(); }
bool float16() { return has_float16(); }
bool amx_bf16() { return has_amx_bf16(); }
int64_t panel() { return 2 * kernels().lanes; }

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY(resnet_fused_cpu, m) {
  m.def("instruction_sets() -> int[]");
  m.def("isa() -> int");
  m.def("limit_isa(int highest) -> int");
  m.def("avx512_bf16() -> bool");
  m.def("float16() -> bool");
  m.def("amx_bf16() -> bool");
  m.def("measure_peak(bool bfloat16) -> float");
  m.def("begin_shares(int first) -> ()");
  m.def("end_shares() -> int[]");
  m.def("panel() -> int");
  m.def("pack(Tensor weight, bool winograd) -> Tensor");
  m.def("pack_grouped(Tensor weight, int groups) -> Tensor");
  m.def("transform(Tensor packed, int in_channels, int out_channels, int stride) -> Tensor");
  m.def("stem(Tensor x, Tensor weights, Tensor bias, int out_channels, bool pool, str activation, float slope) -> Tensor?");
  m.def("empty_activations(Tensor like) -> Tensor");
  m.def("release_activations() -> int");
  m.def("kept_activations() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("instruction_sets", TORCH_BOX(&built_instruction_sets));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("limit_isa", TORCH_BOX(&set_isa_limit));
  m.impl("avx512_bf16", TORCH_BOX(&avx512_bf16));
  m.impl("float16", TORCH_BOX(&float16));
  m.impl("amx_bf16", TORCH_BOX(&amx_bf16));
  m.impl("measure_peak", TORCH_BOX(&measure_peak));
  m.impl("begin_shares", TORCH_BOX(&begin_shares));
  m.impl("end_shares", TORCH_BOX(&end_shares));
  m.impl("panel", TORCH_BOX(&panel));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pack_grouped", TORCH_BOX(&pack_grouped));
  m.impl("transform", TORCH_BOX(&transform));
  m.impl("stem", TORCH_BOX(&stem_of));
  m.impl("empty_activations", TORCH_BOX(&empty_activations));
  m.impl("release_activations", TORCH_BOX(&release_activations));
  m.impl("kept_activations", TORCH_BOX(&kept_activations));
}
