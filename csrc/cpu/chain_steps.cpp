// Operators that add steps to a chain, with the checks of their arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "chain.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_bias(const ConvParams& p, const Tensor& bias) {
  const int64_t padded = padded_channels(p.out_channels);
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == padded, "bias must be float32 with ", padded,
           " elements (whole panels); it has ", bias.numel(), ".");
}

// A grouped convolution's weights, which are float32.
void check_grouped_parameters(const ConvParams& p, const Tensor& weights, const Tensor& bias) {
  RF_CHECK(p.groups > 0 && p.in_channels % p.groups == 0 && p.out_channels % p.groups == 0, "groups is ", p.groups,
           "; it must divide the ", p.in_channels, " input and ", p.out_channels, " output channels.");
  const int64_t wanted = kernels().grouped_size(p.groups, p.in_channels, p.out_channels, p.kernel_h * p.kernel_w);
  RF_CHECK(weights.scalar_type() == ScalarType::Float && weights.numel() == wanted, "weights has ", weights.numel(),
           " elements, the packed weights of this problem ", wanted,
           " of float32; make it with resnet_fused_cpu::pack_grouped.");
  check_bias(p, bias);
}

// Also finds out whether the weights are packed or, for a 3 x 3 convolution, transformed. `direct`: for which kernels.
void check_parameters(ConvParams& p, DType source, bool direct, const Tensor& weights, const Tensor& bias) {
  const DType wanted_type = direct ? direct_weights(source, p.in_channels) : source;
  const int64_t wanted = padded_channels(p.out_channels) * p.kernel_h * p.kernel_w * p.in_channels;
  p.transformed = p.kernel_h == 3 && p.kernel_w == 3 && weights.scalar_type() == ScalarType::Float &&
                  weights.numel() == kernels().transformed_size(p.in_channels, p.out_channels, p.stride_h);
  RF_CHECK(p.transformed || weights.scalar_type() == scalar_type_of(wanted_type),
           "weights have another dtype than these kernels take for this x; make them with resnet_fused_cpu::pack.");
  RF_CHECK(p.transformed || weights.numel() == wanted, "weights has ", weights.numel(),
           " elements, the packed weights of this problem ", wanted, "; make it with resnet_fused_cpu::pack.");
  check_bias(p, bias);
}

void check_residual(const Chain& chain, std::optional<int64_t> residual, const ChainShape& result) {
  RF_CHECK(!residual.has_value() || chain.shape(*residual, "residual") == result, "residual differs from the result in shape.");
}

LayerParams layer_params(DType source, const Tensor& weights, const Tensor& bias, int64_t in_channels, int64_t out_channels,
                         int64_t kernel) {
  ConvParams p{};
  p.in_channels = in_channels, p.out_channels = out_channels, p.kernel_h = p.kernel_w = kernel;
  p.stride_h = p.stride_w = 1;
  check_parameters(p, source, kernel == 1, weights, bias);
  return {weights.const_data_ptr(), p.transformed, static_cast<const float*>(bias.const_data_ptr()), in_channels, out_channels};
}

}  // namespace

// Adds y = act(conv(x, w) + bias + residual). `plan` empty: direct arithmetic; otherwise the five numbers of a WinogradPlan.
int64_t add_conv(Chain& chain, int64_t x, std::optional<int64_t> residual, const Tensor& weights, const Tensor& bias,
                 int64_t out_channels, int64_t groups, const std::vector<int64_t>& geometry, const std::string& activation,
                 double slope, std::vector<int64_t> plan) {
  const ChainShape in = chain.shape(x, "x");
  ConvParams p{};
  p.weights = weights.const_data_ptr();
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.batch = in.n, p.in_channels = in.c, p.height = in.h, p.width = in.w;
  p.out_channels = out_channels, p.groups = groups;
  p.nonlinearity = nonlinearity(activation, slope);
  p.source = p.weight = chain.type();
  set_geometry(p, geometry);
  groups == 1 ? check_parameters(p, p.source, plan.empty(), weights, bias) : check_grouped_parameters(p, weights, bias);
  check_conv(p, plan);
  const ChainShape out{p.batch, p.out_channels, p.out_height, p.out_width};
  check_residual(chain, residual, out);
  chain.parameters.push_back(weights);
  chain.parameters.push_back(bias);
  return chain.add({ChainStep::Convolution{p, std::move(plan)}, {x}, residual.value_or(NO_VALUE)}, out);
}

// Adds y = relu(layers(x) + shortcut(x)) of a block of stride 1. `channels`: those of each layer's result; as many weights and
// biases as layers, and one more for a projection shortcut. `plan`: strip, parts, panels of BlockParams.
int64_t add_block(Chain& chain, int64_t x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                  const std::vector<int64_t>& channels, const std::vector<int64_t>& plan) {
  const ChainShape in = chain.shape(x, "x");
  const bool pairs = direct_weights(chain.type(), in.c) == DType::bfloat16;
  const size_t layers = channels.size();
  const bool projection = weights.size() > layers;
  RF_CHECK((layers == 2 || layers == 3) && (weights.size() == layers || weights.size() == layers + 1) &&
               biases.size() == weights.size(),
           "channels, weights and biases don't describe a basic block (two layers) or a bottleneck (three).");
  RF_CHECK(plan.size() == 3 && plan[0] > 0 && plan[1] > 0 && plan[2] > 0,
           "plan must hold three positive numbers: strip, parts, panels.");
  RF_CHECK(projection || in.c == channels.back(), "channels don't match the identity shortcut.");
  BlockParams p{};
  p.batch = in.n, p.height = in.h, p.width = in.w;
  const auto layer = [&](size_t i, int64_t from, int64_t to, int64_t kernel) {
    RF_CHECK(!pairs || from % 2 == 0, "a bfloat16 block needs even numbers of channels, not ", from, ".");
    return layer_params(chain.type(), weights[i], biases[i], from, to, kernel);
  };
  for (size_t i = 0; i < layers; ++i) {
    const bool pointwise = layers == 3 && i != 1;
    p.layers[i] = layer(i, i == 0 ? in.c : channels[i - 1], channels[i], pointwise ? 1 : 3);
  }
  if (projection) p.shortcut = layer(layers, in.c, channels.back(), 1);
  p.strip = plan[0], p.parts = plan[1], p.panels = plan[2];
  chain.parameters.insert(chain.parameters.end(), weights.begin(), weights.end());
  chain.parameters.insert(chain.parameters.end(), biases.begin(), biases.end());
  return chain.add({p, {x}}, {in.n, channels.back(), in.h, in.w});
}

// Adds y = act((x scale + shift) gate + residual), x being the concatenation of the sources along channels. Scale and shift are
// float32, one value a channel each; the gate has one pixel.
int64_t add_pass(Chain& chain, std::vector<int64_t> sources, std::optional<int64_t> gate, std::optional<int64_t> residual,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
                 double slope) {
  RF_CHECK(!sources.empty(), "sources is empty; a pass reads at least one value.");
  ChainShape shape = chain.shape(sources[0], "a source");
  shape.c = 0;
  for (const int64_t source : sources) {
    const ChainShape& own = chain.shape(source, "a source");
    RF_CHECK(own.n == shape.n && own.h == shape.h && own.w == shape.w, "sources differ in batch, height or width.");
    shape.c += own.c;
  }
  PassParams p{};
  p.batch = shape.n, p.pixels = shape.h * shape.w, p.channels = shape.c;
  p.nonlinearity = nonlinearity(activation, slope);
  p.dtype = chain.type();
  RF_CHECK(scale.has_value() == shift.has_value(), "scale and shift go together; give both, or neither.");
  if (scale.has_value()) {
    for (const Tensor& t : {*scale, *shift}) {
      RF_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == shape.c && t.is_contiguous(),
               "scale and shift must be contiguous float32 with ", shape.c, " elements, those of the channels.");
      chain.parameters.push_back(t);
    }
    p.scale = static_cast<const float*>(scale->const_data_ptr());
    p.shift = static_cast<const float*>(shift->const_data_ptr());
  }
  RF_CHECK(!gate.has_value() || chain.shape(*gate, "gate") == ChainShape({shape.n, shape.c, 1, 1}),
           "gate must have one pixel, and x's batch and channels.");
  check_residual(chain, residual, shape);
  return chain.add({p, std::move(sources), residual.value_or(NO_VALUE), gate.value_or(NO_VALUE)}, shape);
}

// Adds y = mean of x over its pixels.
int64_t add_average_pool(Chain& chain, int64_t x) {
  const ChainShape in = chain.shape(x, "x");
  AveragePoolParams p{};
  p.batch = in.n, p.channels = in.c, p.height = in.h, p.width = in.w;
  p.dtype = chain.type();
  return chain.add({p, {x}}, {in.n, in.c, 1, 1});
}

// ---- Operators ----------------------------------------------------------------------------------------------------------

namespace {

int64_t chain_conv(int64_t chain, int64_t x, std::optional<int64_t> residual, Tensor weights, Tensor bias, int64_t out_channels,
                   int64_t groups, std::vector<int64_t> geometry, std::string activation, double slope,
                   std::vector<int64_t> plan) {
  return add_conv(*chain_of(chain), x, residual, weights, bias, out_channels, groups, geometry, activation, slope,
                  std::move(plan));
}

int64_t chain_block(int64_t chain, int64_t x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                    std::vector<int64_t> channels, std::vector<int64_t> plan) {
  return add_block(*chain_of(chain), x, weights, biases, channels, plan);
}

int64_t chain_pass(int64_t chain, std::vector<int64_t> sources, std::optional<int64_t> gate, std::optional<int64_t> residual,
                   std::optional<Tensor> scale, std::optional<Tensor> shift, std::string activation, double slope) {
  return add_pass(*chain_of(chain), std::move(sources), gate, residual, scale, shift, activation, slope);
}

int64_t chain_average_pool(int64_t chain, int64_t x) { return add_average_pool(*chain_of(chain), x); }

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "chain_conv(int chain, int x, int? residual, Tensor weights, Tensor bias, int out_channels, int groups, "
      "int[] geometry, str activation, float slope, int[] plan) -> int");
  m.def("chain_block(int chain, int x, Tensor[] weights, Tensor[] biases, int[] channels, int[] plan) -> int");
  m.def(
      "chain_pass(int chain, int[] sources, int? gate, int? residual, Tensor? scale, Tensor? shift, str activation, "
      "float slope) -> int");
  m.def("chain_average_pool(int chain, int x) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("chain_conv", TORCH_BOX(&chain_conv));
  m.impl("chain_block", TORCH_BOX(&chain_block));
  m.impl("chain_pass", TORCH_BOX(&chain_pass));
  m.impl("chain_average_pool", TORCH_BOX(&chain_average_pool));
}
