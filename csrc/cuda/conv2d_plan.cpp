#include "conv2d_plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "conv2d_tiles.h"

namespace resnet_fused {
namespace {

constexpr int64_t LARGEST_INT32 = std::numeric_limits<int32_t>::max();
constexpr int64_t MAX_GRID_Y = 65535, SMALLEST_BLOCK_N = 64;

enum Copy { async, through_registers };

struct Kernel {
  const char* name;
  ElementType type;
  bool gather;
  Copy copy;
  int64_t block_m, block_n, block_k, warp_m, warp_n, stages, blocks_by_registers;

  int64_t warps() const { return block_m / warp_m * (block_n / warp_n); }
  int64_t row_bytes() const { return block_k * element_bytes(type); }
  int64_t step_bytes() const { return (block_m + block_n) * row_bytes(); }
  int64_t shared_bytes() const { return stages * step_bytes(); }
};

constexpr std::array KERNELS = {
#define RF_ENTRY(NAME, ELEMENT, ...) Kernel{#NAME, ElementType::ELEMENT, __VA_ARGS__},
    RF_CONV2D_TILES(RF_ENTRY)
#undef RF_ENTRY
};

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument("conv2d: " + reason); }

void check(const Conv2dProblem& p, const WeightLayout& layout) {
  std::ostringstream reason;
  if (p.out_height() <= 0 || p.out_width() <= 0) {
    reason << "the filter of " << p.kernel_h << "x" << p.kernel_w << " does not fit the padded input of " << p.height << "x"
           << p.width;
  } else if (p.out_pixels() > LARGEST_INT32 - 256) {
    reason << p.out_pixels() << " output pixels; the kernels count them in 31 bits";
  } else if (layout.filter_rows > 16 || layout.runs > 15) {
    reason << "filter " << p.kernel_h << "x" << p.kernel_w << "; the kernels serve up to 16 rows and 15 columns";
  } else if (p.channels <= 0 || p.out_channels <= 0) {
    reason << p.channels << " channels in and " << p.out_channels << " out; there must be some";
  } else if (p.out_channels > MAX_GRID_Y * SMALLEST_BLOCK_N) {
    reason << p.out_channels << " output channels; the grid has room for " << MAX_GRID_Y * SMALLEST_BLOCK_N;
  } else if (p.channels * 4 * std::max(p.kernel_w, p.dilation_w) > LARGEST_INT32 || p.height > LARGEST_INT32 / 2 ||
             p.width > LARGEST_INT32 / 2) {
    reason << "a size beyond 31 bits";
  } else {
    return;
  }
  refuse(reason.str());
}

// 1x1 without stride and padding is a plain product: one image of one row.
Conv2dProblem canonical(Conv2dProblem p) {
  const bool pointwise =
      p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
  if (pointwise && p.out_pixels() <= LARGEST_INT32 / 2) {
    p.width = p.out_pixels();
    p.batch = p.height = 1;
  }
  return p;
}

bool gathers(const Conv2dProblem& p) { return p.channels * element_bytes(p.type) % 16 != 0; }

int64_t blocks_per_multiprocessor(const Kernel& k, const DeviceProperties& device) {
  constexpr int64_t RESERVED = 1024;  // bytes the system takes of a block's shared memory
  return std::min(k.blocks_by_registers, device.shared_per_multiprocessor / (k.shared_bytes() + RESERVED));
}

bool serves(const Kernel& k, const Conv2dProblem& p, const DeviceProperties& device) {
  return k.type == p.type && k.gather == gathers(p) && (k.copy == async) == (device.compute_capability >= 80) &&
         k.shared_bytes() <= device.shared_per_block && blocks_per_multiprocessor(k, device) > 0;
}

// Steps of the main loop over all of k.
int64_t total_steps(const Kernel& k, const Conv2dProblem& p) {
  const WeightLayout layout = conv2d_weight_layout(p);
  return layout.filter_rows * layout.runs * ceil_div(layout.padded_run_length, k.block_k);
}

// Cycles by a model of one multiprocessor: a step takes as long as the busiest of its tensor cores, its shared memory
// and its share of L2; a wave of blocks ends with its slowest. Only ratios matter. The figures are those of an A100
// (NVIDIA A100 architecture whitepaper); `resnet-fused tune` replaces the model by measurement.
double modelled_cycles(const Kernel& k, const Conv2dProblem& p, const DeviceProperties& device, int64_t splits) {
  constexpr double SHARED_BYTES = 128, L2_BYTES = 40, MEMORY_BYTES = 10;  // a cycle
  constexpr double BLOCK_START = 1500, LAUNCH = 4000;                     // cycles
  const double products = p.type == ElementType::float32 ? 64 : p.type == ElementType::tf32 ? 512 : 1024;
  const double fragments = double(k.warps() * (k.warp_m + k.warp_n) * k.row_bytes());
  const double step = std::max({double(k.block_m * k.block_n * k.block_k) / products,
                                (fragments + double(k.step_bytes())) / SHARED_BYTES, double(k.step_bytes()) / L2_BYTES});
  const int64_t blocks = ceil_div(p.out_pixels(), k.block_m) * ceil_div(p.out_channels, k.block_n) * splits;
  const double output = double(k.block_m * k.block_n) * (splits > 1 ? 8 : element_bytes(p.type)) / MEMORY_BYTES;
  const double block = double(ceil_div(total_steps(k, p), splits)) * step + output;
  const int64_t resident = blocks_per_multiprocessor(k, device), wave = resident * device.multiprocessors;
  const int64_t rest = ceil_div(blocks % wave, device.multiprocessors);
  const double waves =
      double(blocks / wave) * (double(resident) * block + BLOCK_START) + (rest > 0 ? double(rest) * block + BLOCK_START : 0.0);
  const double reduction = double(p.out_pixels() * p.out_channels * 4 * splits) / double(device.multiprocessors) / L2_BYTES;
  return waves + (splits > 1 ? LAUNCH + reduction : 0.0);
}

// The stem's own kernel, where it serves; empty elsewhere. Its copies are of whole 16 bytes, so rows of x must be.
std::string stem_kernel(const Conv2dProblem& p, const DeviceProperties& device) {
  using Tile = StemTile;
  const bool shape = p.kernel_h == Tile::FILTER && p.kernel_w == Tile::FILTER && p.stride_h == Tile::STRIDE &&
                     p.stride_w == Tile::STRIDE && p.pad_h == Tile::PAD && p.pad_w == Tile::PAD && p.dilation_h == 1 &&
                     p.dilation_w == 1 && p.channels == Tile::INPUT_CHANNELS && p.width % 8 == 0;
  const bool serves = shape && element_bytes(p.type) == 2 && device.compute_capability >= 80 && p.batch <= MAX_GRID_Y;
  return serves ? std::string("conv2d_stem_fwd_") + suffix(p.type) : "";
}

KernelLaunch stem_launch(const Conv2dProblem& p, const std::string& kernel) {
  using Tile = StemTile;
  const int64_t tiles = ceil_div(p.out_height(), Tile::TILE) * ceil_div(p.out_width(), Tile::TILE);
  return {kernel,
          {uint32_t(tiles), uint32_t(p.batch), uint32_t(ceil_div(p.out_channels, Tile::CHANNELS))},
          Tile::THREADS,
          Tile::SHARED_BYTES};
}

struct Choice {
  const Kernel* kernel;
  int64_t splits;
  double cycles;
};

// All kernels that serve, each with `splits` parts of k, or where that is 0 with its best number; the fastest by the
// model first.
std::vector<Choice> choices(const Conv2dProblem& p, const DeviceProperties& device, int64_t splits) {
  constexpr int64_t MAX_SPLITS = 16, MIN_STEPS = 8;                              // fewer steps a split don't fill the pipeline
  if (p.out_pixels() * p.out_channels > LARGEST_INT32 - MAX_GRID_Y) splits = 1;  // the reduction counts in 31 bits
  std::vector<Choice> found;
  for (const Kernel& k : KERNELS) {
    if (!serves(k, p, device)) continue;
    const int64_t least = std::max<int64_t>(splits, 1);
    const int64_t most = splits > 0 ? splits : std::clamp<int64_t>(total_steps(k, p) / MIN_STEPS, 1, MAX_SPLITS);
    Choice best{&k, 0, std::numeric_limits<double>::infinity()};
    for (int64_t s = least; s <= most; s *= 2) {
      const double cycles = modelled_cycles(k, p, device, s);
      if (cycles < best.cycles) best = {&k, s, cycles};
    }
    found.push_back(best);
  }
  std::stable_sort(found.begin(), found.end(), [](const Choice& a, const Choice& b) { return a.cycles < b.cycles; });
  return found;
}

// How many tiles of channels neighbouring blocks take before they go down the pixels: the blocks that run at once
// should cover a near-square part of the product, so that L2 serves both operands. At most 1/8 of the grid may be empty
// blocks.
int32_t group_shift(const Kernel& k, const DeviceProperties& device, int64_t tiles_n) {
  const double at_once = double(blocks_per_multiprocessor(k, device) * device.multiprocessors);
  const double square = std::sqrt(at_once * double(k.block_m) / double(k.block_n));
  for (int32_t bias = 4; bias > 0; --bias) {
    const int64_t group = int64_t{1} << bias, covered = ceil_div(tiles_n, group) * group;
    if (double(group) <= 2 * square && (covered - tiles_n) * 8 <= tiles_n) return bias;
  }
  return 0;
}

Conv2dParams parameters(const Conv2dProblem& p, const Kernel& k, const DeviceProperties& device, int64_t splits) {
  const WeightLayout layout = conv2d_weight_layout(p);
  const int64_t bytes = element_bytes(p.type), pixel = p.channels * bytes, row = p.width * pixel;
  const int64_t steps_per_run = ceil_div(layout.padded_run_length, k.block_k);
  const int64_t within_run = (steps_per_run - 1) * k.row_bytes();
  Conv2dParams q{};
  q.image_stride = p.height * row, q.row_stride = row, q.pixel_stride = int32_t(pixel);
  q.run_delta = p.dilation_w * pixel - within_run;
  q.row_delta = p.dilation_h * row - (layout.runs - 1) * p.dilation_w * pixel - within_run;
  q.weight_stride = layout.filter_rows * layout.runs * layout.padded_run_length * bytes;
  q.weight_delta = int32_t(layout.padded_run_length * bytes - within_run);
  q.height = int32_t(p.height), q.width = int32_t(p.width), q.channels = int32_t(p.channels);
  q.out_pixels = int32_t(p.out_pixels()), q.out_channels = int32_t(p.out_channels);
  q.partial_stride = int32_t(ceil_div(p.out_channels, 4) * 4);
  q.filter_rows = int32_t(layout.filter_rows), q.runs = int32_t(layout.runs);
  q.run_length = int32_t(layout.padded_run_length);
  q.run_pixels = int32_t(layout.run_length / p.channels);
  q.stride_h = int32_t(p.stride_h), q.stride_w = int32_t(p.stride_w), q.pad_h = int32_t(p.pad_h), q.pad_w = int32_t(p.pad_w);
  q.dilation_h = int32_t(p.dilation_h), q.dilation_w = int32_t(p.dilation_w);
  q.steps_per_run = int32_t(steps_per_run);
  q.steps = int32_t(layout.filter_rows * layout.runs * steps_per_run);
  q.steps_per_split = int32_t(ceil_div(q.steps, splits));
  q.splits = int32_t(ceil_div(q.steps, q.steps_per_split));
  q.tiles_n = int32_t(ceil_div(p.out_channels, k.block_n));
  q.group_shift = group_shift(k, device, q.tiles_n);
  q.vectorised = p.out_channels * bytes % 16 == 0;
  q.image = FastDivisor::of(uint32_t(p.out_height() * p.out_width()));
  q.row = FastDivisor::of(uint32_t(p.out_width()));
  q.quads = FastDivisor::of(uint32_t(q.partial_stride / 4));
  return q;
}

Conv2dPlan make_plan(const Conv2dProblem& problem, const DeviceProperties& device, const std::string& kernel, int64_t splits) {
  const Conv2dProblem p = canonical(problem);
  check(p, conv2d_weight_layout(p));
  const std::vector<Choice> found = choices(p, device, splits);
  const std::string stem = stem_kernel(p, device);
  const bool is_stem = !stem.empty() && (kernel.empty() || kernel == stem);
  const auto chosen = kernel.empty() || is_stem
                          ? found.begin()
                          : std::find_if(found.begin(), found.end(), [&](const Choice& c) { return kernel == c.kernel->name; });
  if (chosen == found.end()) {
    std::ostringstream reason;
    reason << "no kernel " << kernel << " for this problem on compute capability " << double(device.compute_capability) / 10;
    refuse(reason.str());
  }
  const Kernel& k = *chosen->kernel;
  Conv2dPlan plan{};
  plan.params = parameters(p, k, device, is_stem ? 1 : chosen->splits);
  if (is_stem) {
    plan.launches.push_back(stem_launch(p, stem));
    return plan;
  }
  const auto& q = plan.params;
  const int64_t group = int64_t{1} << q.group_shift;
  plan.launches.push_back(
      {k.name,
       {uint32_t(ceil_div(q.out_pixels, k.block_m) * group), uint32_t(ceil_div(q.tiles_n, group)), uint32_t(q.splits)},
       uint32_t(32 * k.warps()),
       uint32_t(k.shared_bytes())});
  if (q.splits > 1) {
    constexpr int64_t THREADS = 256, CHANNELS = 4, BLOCKS_PER_MULTIPROCESSOR = 8;
    const int64_t work = int64_t{q.out_pixels} * q.partial_stride / CHANNELS;
    const int64_t blocks = std::min(ceil_div(work, THREADS), BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors);
    plan.workspace_bytes = int64_t{q.splits} * q.out_pixels * q.partial_stride * 4;
    plan.launches.push_back(
        {std::string("conv2d_reduce_fwd_") + suffix(p.type), {uint32_t(blocks), 1, 1}, uint32_t(THREADS), 0});
  }
  return plan;
}

// What a plan depends on, for a table of plans.
struct PlanKey {
  std::array<int64_t, 19> numbers;
  std::string kernel;

  bool operator==(const PlanKey& other) const { return numbers == other.numbers && kernel == other.kernel; }
};

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const {
    uint64_t hash = std::hash<std::string>()(key.kernel);
    // Multiplication by an odd constant, then a bias: each number changes bits of both halves.
    for (const int64_t number : key.numbers) {
      hash = (hash ^ uint64_t(number)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return size_t(hash);
  }
};

PlanKey plan_key(const Conv2dProblem& p, const DeviceProperties& device, const std::string& kernel, int64_t splits) {
  return {{p.batch, p.height, p.width, p.channels, p.out_channels, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w, p.pad_h,
           p.pad_w, p.dilation_h, p.dilation_w, int64_t(p.type), splits, device.compute_capability, device.multiprocessors,
           device.shared_per_block, device.shared_per_multiprocessor},
          kernel};
}

// Plans by what they depend on. Readers share the lock; a full table is emptied, which costs its problems one planning.
class PlanTable {
 public:
  std::shared_ptr<const Conv2dPlan> find(const PlanKey& key) {
    const std::shared_lock lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }

  void keep(PlanKey key, std::shared_ptr<const Conv2dPlan> plan) {
    constexpr size_t MOST = 4096;
    const std::unique_lock lock(mutex_);
    if (plans_.size() >= MOST) plans_.clear();
    plans_.emplace(std::move(key), std::move(plan));
  }

  int64_t size() {
    const std::shared_lock lock(mutex_);
    return int64_t(plans_.size());
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<PlanKey, std::shared_ptr<const Conv2dPlan>, PlanKeyHash> plans_;
};

// Never destroyed: threads may launch while the process ends.
PlanTable& plan_table() {
  static PlanTable& table = *new PlanTable;
  return table;
}

}  // namespace

WeightLayout conv2d_weight_layout(const Conv2dProblem& p) {
  const bool whole_row = gathers(p) && p.dilation_w == 1;
  const int64_t vector = 16 / element_bytes(p.type), length = whole_row ? p.kernel_w * p.channels : p.channels;
  const int64_t lead = gathers(p) ? RUN_LEAD : 0;
  return {p.kernel_h, whole_row ? 1 : p.kernel_w, lead, length, ceil_div(lead + length, vector) * vector};
}

std::vector<std::string> conv2d_kernels(const Conv2dProblem& problem, const DeviceProperties& device) {
  std::vector<std::string> names;
  const std::string stem = stem_kernel(problem, device);
  if (!stem.empty()) names.push_back(stem);
  for (const Choice& choice : choices(canonical(problem), device, 0)) names.push_back(choice.kernel->name);
  return names;
}

std::shared_ptr<const Conv2dPlan> plan_conv2d(const Conv2dProblem& problem, const DeviceProperties& device,
                                              const std::string& kernel, int64_t splits) {
  PlanKey key = plan_key(problem, device, kernel, splits);
  if (auto kept = plan_table().find(key)) return kept;
  auto plan = std::make_shared<const Conv2dPlan>(make_plan(problem, device, kernel, splits));
  plan_table().keep(std::move(key), plan);
  return plan;
}

int64_t kept_conv2d_plans() { return plan_table().size(); }

Conv2dParams with_arguments(const Conv2dPlan& plan, const Conv2dArguments& arguments) {
  Conv2dParams q = plan.params;
  q.x = arguments.x, q.weight = arguments.weight, q.bias = static_cast<const float*>(arguments.bias);
  q.residual = arguments.residual, q.y = arguments.y;
  q.partial = q.splits > 1 ? static_cast<float*>(arguments.partial) : nullptr;
  q.activation = arguments.activation, q.slope = arguments.slope;
  return q;
}

}  // namespace resnet_fused
