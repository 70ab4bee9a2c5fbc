// Convolutions and residual blocks in a row, prepared once for inputs of one shape and then run by one call. What an operator's
// call costs beside its kernel (its arguments, its result, a look at both) is as much as a tenth of a layer's time at batch 1;
// here arguments are checked once, and results in between are memory that no tensor holds.
//
// A chain's values are numbered: 0 is x, 1 the residual, and each step gives the next. resnet_fused/backends/cpu_chain.py is the
// caller.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "../checks.h"
#include "activations.h"
#include "bindings.h"
#include "registry.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t n, c, h, w;
  int64_t count() const { return n * c * h * w; }
  bool operator==(const Shape& o) const { return n == o.n && c == o.c && h == o.h && w == o.w; }
};

// `plan` as run_conv takes it.
struct Convolution {
  ConvParams p;
  std::vector<int64_t> plan;
};

struct Step {
  std::variant<Convolution, BlockParams> work;
  int64_t x, residual;  // values; residual -1: none
};

struct Value {
  Shape shape;
  int64_t last_step = -1;  // that reads it
};

constexpr int64_t X = 0, RESIDUAL = 1, FIRST_RESULT = 2, NONE = -1;

struct Chain {
  ScalarType dtype;
  Isa isa;  // that weights were packed for
  std::vector<Value> values;
  std::vector<Step> steps;
  std::vector<Tensor> parameters;  // what steps point into

  DType type() const { return dtype == ScalarType::BFloat16 ? DType::bfloat16 : DType::float32; }

  const Shape& shape(int64_t value, const char* name) const {
    RF_CHECK(value == X || (value >= FIRST_RESULT && value < static_cast<int64_t>(values.size())), name, " is ", value,
             "; it must be 0, the chain's x, or a step's result.");
    return values[static_cast<size_t>(value)].shape;
  }

  // Whether a step writes its result over its residual: one that no tensor holds and nothing else reads from then on. Each
  // element of a result is written by the thread that has just read that of the residual, so its cache line is there.
  bool in_place(size_t result) const {
    const size_t index = result - FIRST_RESULT;
    const Step& step = steps[index];
    return step.residual >= FIRST_RESULT && step.residual != step.x &&
           values[static_cast<size_t>(step.residual)].last_step == static_cast<int64_t>(index);
  }

  // The value whose memory another is written to in the end.
  size_t owner(size_t value) const {
    while (in_place(value)) value = static_cast<size_t>(steps[value - FIRST_RESULT].residual);
    return value;
  }

  // Adds a step; gives the number of its result.
  int64_t add(Step step, const Shape& result) {
    const int64_t index = static_cast<int64_t>(steps.size());
    for (const int64_t value : {step.x, step.residual}) {
      if (value != NONE) values[static_cast<size_t>(value)].last_step = index;
    }
    steps.push_back(std::move(step));
    values.push_back({result});
    return static_cast<int64_t>(values.size()) - 1;
  }
};

void run_block(const BlockParams& p, DType dtype) {
  const DirectKernels& kernels = direct_kernels(dtype);
  p.layers[2].weights != nullptr ? kernels.bottleneck(p) : kernels.basic_block(p);
}

void run_step(const Step& step, DType dtype, const void* x, const void* residual, void* y, Declined& declined) {
  if (const Convolution* conv = std::get_if<Convolution>(&step.work)) {
    ConvParams p = conv->p;
    p.x = x, p.residual = residual, p.y = y, p.declined = &declined;
    run_conv(p, conv->plan);
  } else {
    BlockParams p = std::get<BlockParams>(step.work);
    p.x = x, p.y = y, p.declined = &declined;
    run_block(p, dtype);
  }
}

// ---- The chains that exist ----------------------------------------------------------------------------------------------

// Never destroyed: a kernel may outlive every static object of this library.
Registry<Chain>& chains() {
  static Registry<Chain>* const instance = new Registry<Chain>("chain");
  return *instance;
}

// ---- Operators ----------------------------------------------------------------------------------------------------------

int64_t new_chain(std::vector<int64_t> shape, bool bfloat16) {
  RF_CHECK(shape.size() == 4 && shape[0] > 0 && shape[1] > 0 && shape[2] > 0 && shape[3] > 0,
           "shape must be four positive numbers, (N, C, H, W), those of x.");
  Chain chain{bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, detected_isa(), {}, {}, {}};
  chain.values = {{{shape[0], shape[1], shape[2], shape[3]}}, {{0, 0, 0, 0}}};
  return chains().add(std::make_shared<Chain>(std::move(chain)));
}

void delete_chain(int64_t chain) { chains().remove(chain); }

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

// Also finds out whether the weights are packed or, for a 3 x 3 convolution, transformed.
void check_parameters(ConvParams& p, ScalarType dtype, const Tensor& weights, const Tensor& bias) {
  const int64_t wanted = padded_channels(p.out_channels) * p.kernel_h * p.kernel_w * p.in_channels;
  p.transformed = p.kernel_h == 3 && p.kernel_w == 3 && weights.scalar_type() == ScalarType::Float &&
                  weights.numel() == kernels().transformed_size(p.in_channels, p.out_channels, p.stride_h);
  RF_CHECK(p.transformed || weights.scalar_type() == dtype, "weights and x differ in dtype; pack the weights in x's dtype.");
  RF_CHECK(p.transformed || weights.numel() == wanted, "weights has ", weights.numel(),
           " elements, the packed weights of this problem ", wanted, "; make it with resnet_fused_cpu::pack.");
  check_bias(p, bias);
}

// Adds y = act(conv(x, w) + bias + residual). `plan` empty: direct arithmetic (in bfloat16 on weights packed in pairs);
// otherwise the five numbers of a WinogradPlan.
int64_t chain_conv(int64_t id, int64_t x, std::optional<int64_t> residual, Tensor weights, Tensor bias, int64_t out_channels,
                   int64_t groups, std::vector<int64_t> geometry, std::string activation, double slope,
                   std::vector<int64_t> plan) {
  const std::shared_ptr<Chain> chain = chains().get(id);
  const Shape in = chain->shape(x, "x");
  ConvParams p{};
  p.weights = weights.const_data_ptr();
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.batch = in.n, p.in_channels = in.c, p.height = in.h, p.width = in.w;
  p.out_channels = out_channels, p.groups = groups;
  p.nonlinearity = nonlinearity(activation, slope);
  p.source = p.weight = chain->type();
  set_geometry(p, geometry);
  groups == 1 ? check_parameters(p, chain->dtype, weights, bias) : check_grouped_parameters(p, weights, bias);
  check_conv(p, plan);
  const Shape out{p.batch, p.out_channels, p.out_height, p.out_width};
  if (residual == RESIDUAL) {
    chain->values[RESIDUAL].shape = out;
  } else if (residual.has_value()) {
    RF_CHECK(chain->shape(*residual, "residual") == out, "residual differs from the result in shape.");
  }
  chain->parameters.push_back(weights);
  chain->parameters.push_back(bias);
  return chain->add({Convolution{p, std::move(plan)}, x, residual.value_or(NONE)}, out);
}

LayerParams layer_params(ScalarType dtype, const Tensor& weights, const Tensor& bias, int64_t in_channels, int64_t out_channels,
                         int64_t kernel) {
  ConvParams p{};
  p.in_channels = in_channels, p.out_channels = out_channels, p.kernel_h = p.kernel_w = kernel;
  p.stride_h = p.stride_w = 1;
  check_parameters(p, dtype, weights, bias);
  return {weights.const_data_ptr(), p.transformed, static_cast<const float*>(bias.const_data_ptr()), in_channels, out_channels};
}

// Adds y = relu(layers(x) + shortcut(x)) of a block of stride 1. `channels`: those of each layer's result; as many weights and
// biases as layers, and one more for a projection shortcut. `plan`: strip, parts, panels of BlockParams.
int64_t chain_block(int64_t id, int64_t x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                    std::vector<int64_t> channels, std::vector<int64_t> plan) {
  const std::shared_ptr<Chain> chain = chains().get(id);
  const Shape in = chain->shape(x, "x");
  const bool bfloat16 = chain->type() == DType::bfloat16;
  RF_CHECK(!bfloat16 || has_avx512_bf16(), "a bfloat16 block as a whole needs a CPU with AVX512_BF16.");
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
    RF_CHECK(!bfloat16 || from % 2 == 0, "a bfloat16 block needs even numbers of channels, not ", from, ".");
    return layer_params(chain->dtype, weights[i], biases[i], from, to, kernel);
  };
  for (size_t i = 0; i < layers; ++i) {
    const bool pointwise = layers == 3 && i != 1;
    p.layers[i] = layer(i, i == 0 ? in.c : channels[i - 1], channels[i], pointwise ? 1 : 3);
  }
  if (projection) p.shortcut = layer(layers, in.c, channels.back(), 1);
  p.strip = plan[0], p.parts = plan[1], p.panels = plan[2];
  chain->parameters.insert(chain->parameters.end(), weights.begin(), weights.end());
  chain->parameters.insert(chain->parameters.end(), biases.begin(), biases.end());
  return chain->add({p, x, NONE}, {in.n, channels.back(), in.h, in.w});
}

const void* check_input(const Chain& chain, int64_t value, const Tensor& t, const char* name) {
  const Shape& shape = chain.values[static_cast<size_t>(value)].shape;
  check_cpu_activations(t, name);
  RF_CHECK(t.scalar_type() == chain.dtype && Shape({t.size(0), t.size(1), t.size(2), t.size(3)}) == shape, name,
           " differs in shape or dtype from that which the chain was made for.");
  return t.const_data_ptr();
}

// The last step's result; none where a step declined its x.
std::optional<Tensor> run_chain(int64_t id, Tensor x, std::optional<Tensor> residual) {
  const std::shared_ptr<const Chain> shared = chains().get(id);
  const Chain& chain = *shared;
  RF_CHECK(!chain.steps.empty(), "chain has no steps.");
  RF_CHECK(chain.isa == detected_isa(), "chain was made before limit_isa chose other kernels; make it again.");
  RF_CHECK(residual.has_value() == (chain.values[RESIDUAL].last_step >= 0),
           residual.has_value() ? "residual is given, but no step adds it." : "residual is missing; a step adds it.");
  std::vector<const void*> data(chain.values.size());
  data[X] = check_input(chain, X, x, "x");
  if (residual.has_value()) data[RESIDUAL] = check_input(chain, RESIDUAL, *residual, "residual");

  std::optional<Tensor> y;
  Declined declined{false};
  std::vector<ActivationMemory> memory(chain.values.size());
  const size_t owner = chain.owner(chain.values.size() - 1);
  for (size_t i = 0; i < chain.steps.size(); ++i) {
    const Step& step = chain.steps[i];
    const size_t result = FIRST_RESULT + i;
    const Shape& shape = chain.values[result].shape;
    void* to = nullptr;
    if (chain.in_place(result)) {
      to = const_cast<void*>(data[static_cast<size_t>(step.residual)]);
    } else if (result == owner) {
      // Not before: memory that waits for its use is memory less in the caches.
      y = new_activations(x, shape.n, shape.c, shape.h, shape.w);
      to = y->mutable_data_ptr();
    } else {
      memory[result] = take_activation_memory(shape.count() * static_cast<int64_t>(x.element_size()));
      to = memory[result]->memory;
    }
    data[result] = to;
    run_step(step, chain.type(), data[static_cast<size_t>(step.x)],
             step.residual == NONE ? nullptr : data[static_cast<size_t>(step.residual)], to, declined);
    if (declined.load(std::memory_order_relaxed)) return std::nullopt;
    if (chain.in_place(result)) memory[result] = std::move(memory[static_cast<size_t>(step.residual)]);
    for (const int64_t read : {step.x, step.residual}) {
      if (read != NONE && chain.values[static_cast<size_t>(read)].last_step == static_cast<int64_t>(i)) {
        memory[static_cast<size_t>(read)].reset();
      }
    }
  }
  return y;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("new_chain(int[] shape, bool bfloat16) -> int");
  m.def("delete_chain(int chain) -> ()");
  m.def(
      "chain_conv(int chain, int x, int? residual, Tensor weights, Tensor bias, int out_channels, int groups, "
      "int[] geometry, str activation, float slope, int[] plan) -> int");
  m.def("chain_block(int chain, int x, Tensor[] weights, Tensor[] biases, int[] channels, int[] plan) -> int");
  m.def("run_chain(int chain, Tensor x, Tensor? residual) -> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("new_chain", TORCH_BOX(&new_chain));
  m.impl("delete_chain", TORCH_BOX(&delete_chain));
  m.impl("chain_conv", TORCH_BOX(&chain_conv));
  m.impl("chain_block", TORCH_BOX(&chain_block));
  m.impl("run_chain", TORCH_BOX(&run_chain));
}
