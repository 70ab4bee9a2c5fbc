// Operators that make a chain and run it; chain_steps.cpp has those that add its steps.
#include "chain.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "activations.h"
#include "registry.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Never destroyed: a kernel may outlive every static object of this library.
Registry<Chain>& chains() {
  static Registry<Chain>* const instance = new Registry<Chain>("chain");
  return *instance;
}

void run_block(const BlockParams& p, DType dtype) {
  const DirectKernels& kernels = direct_kernels(dtype, p.layers[0].in_channels);
  p.layers[2].weights != nullptr ? kernels.bottleneck(p) : kernels.basic_block(p);
}

// Runs a step; `data` points to the values.
struct StepRun {
  const Chain& chain;
  const ChainStep& step;
  const std::vector<const void*>& data;
  void* y;
  Declined& declined;

  const void* at(int64_t value) const { return value == NO_VALUE ? nullptr : data[static_cast<size_t>(value)]; }

  void operator()(const ChainStep::Convolution& conv) const {
    ConvParams p = conv.p;
    p.x = at(step.sources[0]), p.residual = at(step.residual), p.y = y, p.declined = &declined;
    run_conv(p, conv.plan);
  }
  void operator()(BlockParams p) const {
    p.x = at(step.sources[0]), p.y = y, p.declined = &declined;
    run_block(p, chain.type());
  }
  void operator()(PassParams p) const {
    std::vector<PassSource> sources;
    for (const int64_t source : step.sources) {
      sources.push_back({at(source), chain.values[static_cast<size_t>(source)].shape.c});
    }
    p.sources = sources.data(), p.source_count = static_cast<int64_t>(sources.size());
    p.gate = at(step.gate), p.residual = at(step.residual), p.y = y;
    kernels().pass(p);
  }
  void operator()(AveragePoolParams p) const {
    p.x = at(step.sources[0]), p.y = y;
    kernels().average_pool(p);
  }
};

// The value that a step's result is written over: one that no tensor holds and nothing else reads from then on. Each element of
// the result is written by the thread that has just read that of the value, so its cache line is there. NO_VALUE: none.
int64_t written_over(const Chain& chain, int64_t index) {
  const ChainStep& step = chain.steps[static_cast<size_t>(index)];
  const auto may = [&](int64_t value) {
    if (value < chain.inputs) return false;
    const Chain::Value& own = chain.values[static_cast<size_t>(value)];
    return !own.result && own.last_step == index;
  };
  const bool pass = std::holds_alternative<PassParams>(step.work);
  const int64_t x = step.sources[0];
  if (may(step.residual) && (pass || step.residual != x)) return step.residual;
  return pass && step.sources.size() == 1 && may(x) ? x : NO_VALUE;
}

const void* check_input(const Chain& chain, size_t value, const Tensor& t) {
  check_cpu_activations(t, "an input");
  RF_CHECK(
      t.scalar_type() == chain.dtype && ChainShape({t.size(0), t.size(1), t.size(2), t.size(3)}) == chain.values[value].shape,
      "input ", value, " differs in shape or dtype from that which the chain was made for.");
  return t.const_data_ptr();
}

}  // namespace

std::shared_ptr<Chain> chain_of(int64_t id) { return chains().get(id); }

Chain make_chain(const std::vector<ChainShape>& shapes, ScalarType dtype) {
  check_dtype(dtype, "x");
  Chain chain{dtype, detected_isa(), static_cast<int64_t>(shapes.size()), {}, {}, {}, {}};
  for (const ChainShape& shape : shapes) {
    RF_CHECK(shape.n > 0 && shape.c > 0 && shape.h > 0 && shape.w > 0, "shapes has a size that isn't positive, of input ",
             chain.values.size(), "; empty inputs are stock's.");
    chain.values.push_back({shape});
  }
  return chain;
}

void end_chain(Chain& chain, std::vector<int64_t> results) {
  RF_CHECK(!results.empty() && chain.results.empty(), "results must be given once, at least one.");
  for (const int64_t value : results) {
    chain.shape(value, "a result");
    RF_CHECK(value >= chain.inputs && std::count(results.begin(), results.end(), value) == 1, "a result is ", value,
             "; each must be a step's, and stand there once.");
  }
  for (const int64_t value : results) chain.values[static_cast<size_t>(value)].result = true;
  for (size_t i = 0; i < chain.steps.size(); ++i) {
    chain.values[static_cast<size_t>(chain.inputs) + i].over = written_over(chain, static_cast<int64_t>(i));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    int64_t first = results[i];
    while (chain.values[static_cast<size_t>(first)].over != NO_VALUE) first = chain.values[static_cast<size_t>(first)].over;
    chain.values[static_cast<size_t>(first)].tensor = static_cast<int64_t>(i);
  }
  chain.results = std::move(results);
}

std::vector<Tensor> run_chain(const Chain& chain, const std::vector<Tensor>& inputs) {
  RF_CHECK(!chain.results.empty(), "chain has no results; call end_chain.");
  RF_CHECK(chain.isa == detected_isa(), "chain was made before limit_isa chose other kernels; make it again.");
  RF_CHECK(static_cast<int64_t>(inputs.size()) == chain.inputs, "inputs has ", inputs.size(), " tensors; the chain takes ",
           chain.inputs, ".");
  std::vector<const void*> data(chain.values.size());
  for (size_t i = 0; i < inputs.size(); ++i) data[i] = check_input(chain, i, inputs[i]);

  std::vector<std::optional<Tensor>> results(chain.results.size());
  std::vector<ActivationMemory> memory(chain.values.size());
  Declined declined{false};
  for (size_t i = 0; i < chain.steps.size(); ++i) {
    const ChainStep& step = chain.steps[i];
    const size_t value = static_cast<size_t>(chain.inputs) + i;
    const auto& [shape, last_step, is_result, over, tensor] = chain.values[value];
    void* to = nullptr;
    if (over != NO_VALUE) {
      to = const_cast<void*>(data[static_cast<size_t>(over)]);
    } else if (tensor != NO_VALUE) {
      // Not before: memory that waits for its use is memory less in the caches.
      auto& result = results[static_cast<size_t>(tensor)];
      result = new_activations(inputs[0], shape.n, shape.c, shape.h, shape.w);
      to = result->mutable_data_ptr();
    } else {
      memory[value] = take_activation_memory(shape.count() * static_cast<int64_t>(inputs[0].element_size()));
      to = memory[value]->memory;
    }
    data[value] = to;
    std::visit(StepRun{chain, step, data, to, declined}, step.work);
    if (declined.load(std::memory_order_relaxed)) return {};
    if (over != NO_VALUE) memory[value] = std::move(memory[static_cast<size_t>(over)]);
    step.for_reads([&](int64_t read) {
      if (chain.values[static_cast<size_t>(read)].last_step == static_cast<int64_t>(i))
        memory[static_cast<size_t>(read)].reset();
    });
  }
  std::vector<Tensor> found;
  for (const auto& result : results) found.push_back(*result);
  return found;
}

// ---- Operators ----------------------------------------------------------------------------------------------------------

namespace {

// `shapes`: four numbers for each input, (N, C, H, W).
int64_t new_chain(std::vector<int64_t> shapes, ScalarType dtype) {
  RF_CHECK(!shapes.empty() && shapes.size() % 4 == 0, "shapes has ", shapes.size(),
           " numbers; it must have four, (N, C, H, W), for each input.");
  std::vector<ChainShape> inputs;
  for (size_t i = 0; i < shapes.size(); i += 4) inputs.push_back({shapes[i], shapes[i + 1], shapes[i + 2], shapes[i + 3]});
  return chains().add(std::make_shared<Chain>(make_chain(inputs, dtype)));
}

void delete_chain(int64_t chain) { chains().remove(chain); }

void end_chain_of(int64_t chain, std::vector<int64_t> results) { end_chain(*chain_of(chain), std::move(results)); }

std::vector<Tensor> run_chain_of(int64_t chain, std::vector<Tensor> inputs) {
  const std::shared_ptr<const Chain> shared = chain_of(chain);
  return run_chain(*shared, inputs);
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("new_chain(int[] shapes, ScalarType dtype) -> int");
  m.def("delete_chain(int chain) -> ()");
  m.def("end_chain(int chain, int[] results) -> ()");
  m.def("run_chain(int chain, Tensor[] inputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("new_chain", TORCH_BOX(&new_chain));
  m.impl("delete_chain", TORCH_BOX(&delete_chain));
  m.impl("end_chain", TORCH_BOX(&end_chain_of));
  m.impl("run_chain", TORCH_BOX(&run_chain_of));
}
