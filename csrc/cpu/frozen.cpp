// Operators of frozen models (resnet_fused/fusion/freeze.py), which run without Python: functions of tensors, packed weights
// among them, that give new tensors. What a kernel declines they leave to stock's convolution by themselves.
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../frozen.h"
#include "activations.h"
#include "chain.h"
#include "runtime.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* name_of(int64_t isa) {
  // In the order of Isa.
  static const char* const NAMES[] = {"no vectors", "AVX2", "AVX-512"};
  return isa >= 0 && isa < static_cast<int64_t>(std::size(NAMES)) ? NAMES[isa] : "unknown vectors";
}

void check_isa(int64_t isa) {
  const int64_t own = static_cast<int64_t>(detected_isa());
  RF_CHECK(isa == own, "isa is ", isa, ": the model was frozen for kernels with ", name_of(isa),
           ", and this process runs those with ", name_of(own),
           ", whose weights are packed in another way; freeze the model on a machine with this CPU.");
}

ChainShape shape_of(const Tensor& t, const char* name) {
  check_cpu_activations(t, name);
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

// What a chain of one step gives, none if it declined. `add` adds the step, given the numbers of the inputs that there are.
template <class Add>
std::optional<Tensor> run_step(const std::vector<Tensor>& inputs, Add&& add) {
  std::vector<ChainShape> shapes;
  for (const Tensor& t : inputs) shapes.push_back(shape_of(t, "an input"));
  Chain chain = make_chain(shapes, inputs[0].scalar_type());
  end_chain(chain, {add(chain)});
  std::vector<Tensor> results = run_chain(chain, inputs);
  return results.empty() ? std::nullopt : std::optional<Tensor>(results[0]);
}

Tensor pass(std::vector<Tensor> sources, const std::optional<Tensor>& gate, const std::optional<Tensor>& residual,
            const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
            double slope) {
  std::vector<Tensor> inputs = sources;
  const auto number = [&](const std::optional<Tensor>& t) -> std::optional<int64_t> {
    if (!t.has_value()) return std::nullopt;
    inputs.push_back(*t);
    return static_cast<int64_t>(inputs.size()) - 1;
  };
  const std::optional<int64_t> gate_number = number(gate), residual_number = number(residual);
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < sources.size(); ++i) numbers.push_back(static_cast<int64_t>(i));
  RF_CHECK(!sources.empty(), "sources is empty; a pass reads at least one tensor.");
  return *run_step(inputs, [&](Chain& chain) {
    return add_pass(chain, numbers, gate_number, residual_number, scale, shift, activation, slope);
  });
}

Tensor in_channels_last(const Tensor& t) {
  Tensor y = new_activations(t, t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(y, t);
  return y;
}

// act(conv(x, weight) + bias + residual) by stock's convolution, which has stock's answer for any values. `bias` is padded.
Tensor stock_conv(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  const std::string& activation, double slope) {
  Tensor own = bias;
  own = torch::stable::to(torch::stable::narrow(own, 0, 0, weight.size(0)), x.scalar_type());
  const Tensor sums =
      call("aten::conv2d", "", x, weight, std::optional<Tensor>(own), stride, padding, dilation, static_cast<int64_t>(1));
  return pass({in_channels_last(sums)}, std::nullopt, residual, std::nullopt, std::nullopt, activation, slope);
}

// ---- Operators ----------------------------------------------------------------------------------------------------------

// x with exactly these strides, after a look at whether it is what the model was frozen for.
Tensor frozen_input(Tensor x, std::vector<int64_t> shape, std::vector<int64_t> strides, ScalarType dtype) {
  return frozen_input_on("the CPU", x.is_cpu(), x, shape, strides, dtype);
}

// As add_conv, but `plan` is a single 0 for direct sums: AOTInductor loses the type of an empty list. `plain`: the weight as
// stock takes it, for what Winograd declines; not needed without a plan.
Tensor frozen_conv(Tensor x, std::optional<Tensor> residual, Tensor weights, Tensor bias, std::optional<Tensor> plain,
                   int64_t out_channels, int64_t groups, std::vector<int64_t> geometry, std::string activation, double slope,
                   std::vector<int64_t> plan, int64_t isa) {
  check_isa(isa);
  if (plan.size() == 1) plan.clear();
  RF_CHECK(plan.empty() || plain.has_value(), "plain is missing; a convolution by Winograd needs it for what it declines.");
  std::vector<Tensor> inputs{x};
  if (residual.has_value()) inputs.push_back(*residual);
  const std::optional<int64_t> added = residual.has_value() ? std::optional<int64_t>(1) : std::nullopt;
  const std::optional<Tensor> y = run_step(inputs, [&](Chain& chain) {
    return add_conv(chain, 0, added, weights, bias, out_channels, groups, geometry, activation, slope, plan);
  });
  if (y.has_value()) return *y;
  return stock_conv(x, residual, *plain, bias, {geometry[2], geometry[3]}, {geometry[4], geometry[5]},
                    {geometry[6], geometry[7]}, activation, slope);
}

// As add_block. `plain`: the weights as stock takes them, in the order of `weights`.
Tensor frozen_block(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> plain,
                    std::vector<int64_t> channels, std::vector<int64_t> plan, int64_t isa) {
  check_isa(isa);
  RF_CHECK(plain.size() == weights.size(), "plain has ", plain.size(), " weights; it must have ", weights.size(),
           ", as `weights`.");
  const std::optional<Tensor> whole =
      run_step({x}, [&](Chain& chain) { return add_block(chain, 0, weights, biases, channels, plan); });
  if (whole.has_value()) return *whole;
  const auto layer = [&](size_t i, const Tensor& from, const std::optional<Tensor>& residual, const char* activation) {
    const int64_t pad = plain[i].size(2) / 2;
    return stock_conv(from, residual, plain[i], biases[i], {1, 1}, {pad, pad}, {1, 1}, activation, 0);
  };
  const size_t layers = channels.size();
  const Tensor shortcut = plain.size() > layers ? layer(layers, x, std::nullopt, "none") : x;
  Tensor y = x;
  for (size_t i = 0; i < layers; ++i) {
    y = layer(i, y, i + 1 == layers ? std::optional<Tensor>(shortcut) : std::nullopt, "relu");
  }
  return y;
}

// As stem. `plain`: the weight as stock takes it.
Tensor frozen_stem(Tensor x, Tensor weights, Tensor bias, Tensor plain, int64_t out_channels, bool pool, std::string activation,
                   double slope, int64_t isa) {
  check_isa(isa);
  const std::optional<Tensor> found = stem(x, weights, bias, out_channels, pool, activation, slope);
  if (found.has_value()) return *found;
  const Tensor y = stock_conv(x, std::nullopt, plain, bias, {2, 2}, {3, 3}, {1, 1}, activation, slope);
  if (!pool) return y;
  const std::vector<int64_t> window{3, 3}, stride{2, 2}, one{1, 1};
  return in_channels_last(call("aten::max_pool2d", "", y, window, stride, one, one, false));
}

Tensor frozen_pass(std::vector<Tensor> sources, std::optional<Tensor> gate, std::optional<Tensor> residual,
                   std::optional<Tensor> scale, std::optional<Tensor> shift, std::string activation, double slope) {
  return pass(std::move(sources), gate, residual, scale, shift, activation, slope);
}

Tensor frozen_average_pool(Tensor x) {
  return *run_step({x}, [](Chain& chain) { return add_average_pool(chain, 0); });
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("frozen_input(Tensor x, int[] shape, int[] strides, ScalarType dtype) -> Tensor");
  m.def(
      "frozen_conv(Tensor x, Tensor? residual, Tensor weights, Tensor bias, Tensor? plain, int out_channels, int groups, "
      "int[] geometry, str activation, float slope, int[] plan, int isa) -> Tensor");
  m.def(
      "frozen_block(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] plain, int[] channels, int[] plan, int isa) -> "
      "Tensor");
  m.def(
      "frozen_stem(Tensor x, Tensor weights, Tensor bias, Tensor plain, int out_channels, bool pool, str activation, "
      "float slope, int isa) -> Tensor");
  m.def(
      "frozen_pass(Tensor[] sources, Tensor? gate, Tensor? residual, Tensor? scale, Tensor? shift, str activation, "
      "float slope) -> Tensor");
  m.def("frozen_average_pool(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("frozen_input", TORCH_BOX(&frozen_input));
  m.impl("frozen_conv", TORCH_BOX(&frozen_conv));
  m.impl("frozen_block", TORCH_BOX(&frozen_block));
  m.impl("frozen_stem", TORCH_BOX(&frozen_stem));
  m.impl("frozen_pass", TORCH_BOX(&frozen_pass));
  m.impl("frozen_average_pool", TORCH_BOX(&frozen_average_pool));
}
