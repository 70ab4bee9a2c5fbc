// A chain: steps prepared once for inputs of given shapes and then run by one call. What an operator's call costs beside its
// kernel (its arguments, its result, a look at both) is as much as a tenth of a layer's time at batch 1; here arguments are
// checked once, and results in between are memory that no tensor holds.
//
// A chain's values are numbered: first its inputs, then the result of each step. resnet_fused/backends/cpu/chain.py is the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "bindings.h"

namespace resnet_fused::cpu {

struct ChainShape {
  int64_t n, c, h, w;
  int64_t count() const { return n * c * h * w; }
  bool operator==(const ChainShape& o) const { return n == o.n && c == o.c && h == o.h && w == o.w; }
};

constexpr int64_t NO_VALUE = -1;

struct ChainStep {
  // `plan` as run_conv takes it.
  struct Convolution {
    ConvParams p;
    std::vector<int64_t> plan;
  };

  std::variant<Convolution, BlockParams, PassParams, AveragePoolParams> work;
  std::vector<int64_t> sources;  // values: x, or of a pass what is concatenated
  int64_t residual = NO_VALUE, gate = NO_VALUE;

  // Runs visit(value) for each value that it reads.
  template <class Visit>
  void for_reads(Visit&& visit) const {
    for (const int64_t source : sources) visit(source);
    if (residual != NO_VALUE) visit(residual);
    if (gate != NO_VALUE) visit(gate);
  }
};

struct Chain {
  struct Value {
    ChainShape shape;
    int64_t last_step = -1;     // that reads it
    bool result = false;        // of the chain
    int64_t over = NO_VALUE;    // the value that it is written over
    int64_t tensor = NO_VALUE;  // place of the chain's result that has its memory; it makes the tensor
  };

  torch::headeronly::ScalarType dtype;
  Isa isa;  // that weights were packed for
  int64_t inputs;
  std::vector<Value> values;
  std::vector<ChainStep> steps;
  std::vector<torch::stable::Tensor> parameters;  // what steps point into
  std::vector<int64_t> results;                   // set by end_chain, after which no step is added

  DType type() const { return dtype_of(dtype); }

  const ChainShape& shape(int64_t value, const char* name) const {
    RF_CHECK(value >= 0 && value < static_cast<int64_t>(values.size()), name, " is ", value,
             "; it must be the number of an input, or of a step's result.");
    return values[static_cast<size_t>(value)].shape;
  }

  // Adds a step; gives the number of its result.
  int64_t add(ChainStep step, const ChainShape& result) {
    RF_CHECK(results.empty(), "chain has its results already; add steps before them.");
    const int64_t index = static_cast<int64_t>(steps.size());
    step.for_reads([&](int64_t value) { values[static_cast<size_t>(value)].last_step = index; });
    steps.push_back(std::move(step));
    values.push_back({result});
    return static_cast<int64_t>(values.size()) - 1;
  }
};

// The chain of a number. Throws where there is none.
std::shared_ptr<Chain> chain_of(int64_t id);

// A chain without steps, on inputs of these shapes and this dtype.
Chain make_chain(const std::vector<ChainShape>& shapes, torch::headeronly::ScalarType dtype);

// Says which values, results of steps, a run gives.
void end_chain(Chain& chain, std::vector<int64_t> results);

// The chain's results, in the order in which end_chain was given them; none where a step declined its x.
std::vector<torch::stable::Tensor> run_chain(const Chain& chain, const std::vector<torch::stable::Tensor>& inputs);

// The steps, each of which gives the number of its result; chain_steps.cpp has their arguments.
int64_t add_conv(Chain& chain, int64_t x, std::optional<int64_t> residual, const torch::stable::Tensor& weights,
                 const torch::stable::Tensor& bias, int64_t out_channels, int64_t groups, const std::vector<int64_t>& geometry,
                 const std::string& activation, double slope, std::vector<int64_t> plan);
int64_t add_block(Chain& chain, int64_t x, const std::vector<torch::stable::Tensor>& weights,
                  const std::vector<torch::stable::Tensor>& biases, const std::vector<int64_t>& channels,
                  const std::vector<int64_t>& plan);
int64_t add_pass(Chain& chain, std::vector<int64_t> sources, std::optional<int64_t> gate, std::optional<int64_t> residual,
                 const std::optional<torch::stable::Tensor>& scale, const std::optional<torch::stable::Tensor>& shift,
                 const std::string& activation, double slope);
int64_t add_average_pool(Chain& chain, int64_t x);

}  // namespace resnet_fused::cpu
