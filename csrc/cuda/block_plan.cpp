#include "block_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "block_tiles.h"

namespace resnet_fused {
namespace {

struct Kernel {
  const char* name;
  ElementType type;
  int64_t in, inner, out;
  bool projected, resident;
  int64_t warps, blocks_by_registers;
  int64_t pixels;       // of a step, at most
  int64_t stage_bytes;  // of weights in shared memory
  int64_t pixel_bytes, halo_bytes;

  int64_t shared_bytes(int64_t rows, int64_t width) const {
    const int64_t ring = (rows + 2) * ring_pitch(width) + pixel_bytes, table = rows * width * 4;
    return stage_bytes + ring + table;
  }
  int64_t ring_pitch(int64_t width) const { return width * pixel_bytes + halo_bytes; }
};

template <class Tile>
constexpr Kernel kernel_of(const char* name, ElementType type, int64_t blocks) {
  return {name,
          type,
          Tile::IN,
          Tile::WIDTH,
          Tile::OUT,
          Tile::PROJECTED,
          Tile::RESIDENT,
          Tile::WARPS,
          blocks,
          Tile::WARPS * Tile::WARP_PIXELS,
          Tile::STAGES * CHUNK_BYTES,
          RING_PIXEL_BYTES<Tile::WIDTH>,
          RING_HALO_BYTES<Tile::WIDTH>};
}

constexpr std::array KERNELS = {
#define RF_ENTRY(NAME, ELEMENT, IN, WIDTH, PROJECTED, RESIDENT, WARPS, BLOCKS) \
  kernel_of<BottleneckTile<IN, WIDTH, PROJECTED, RESIDENT, WARPS>>(#NAME, ElementType::ELEMENT, BLOCKS),
    RF_BOTTLENECK_KERNELS(RF_ENTRY, f16, float16) RF_BOTTLENECK_KERNELS(RF_ENTRY, bf16, bfloat16)
#undef RF_ENTRY
};

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument("bottleneck: " + reason); }

constexpr int64_t HALO_ROWS = 2, RESERVED = 1024;  // RESERVED: bytes the system takes of a block's shared memory

// The most rows a step that a kernel's warps and shared memory have room for; 0 if those aren't enough for its first rows.
int64_t rows_of_step(const Kernel& k, const BlockProblem& p, const DeviceProperties& device) {
  int64_t rows = std::min(k.pixels / p.width, std::max(p.height, HALO_ROWS));
  while (rows >= HALO_ROWS && k.shared_bytes(rows, p.width) > device.shared_per_block) --rows;
  return rows >= HALO_ROWS ? rows : 0;
}

bool matches(const Kernel& k, const BlockProblem& p) {
  return k.type == p.type && k.in == p.channels && k.inner == p.inner_channels && k.out == p.out_channels &&
         k.projected == p.projected;
}

// Why no kernel serves the problem; empty if one does.
std::string why_not(const BlockProblem& p, const DeviceProperties& device) {
  std::ostringstream reason;
  if (std::none_of(KERNELS.begin(), KERNELS.end(), [&](const Kernel& k) { return matches(k, p); })) {
    reason << "as a whole there are kernels for " << (p.projected ? "projected " : "") << "blocks of other widths than "
           << p.channels << " -> " << p.inner_channels << " -> " << p.out_channels << " channels, or of other dtypes";
  } else if (device.compute_capability < 80) {
    reason << "as a whole it needs compute capability 8.0 or newer, not " << double(device.compute_capability) / 10;
  } else if (p.batch <= 0 || p.height <= 0 || p.width <= 0) {
    reason << "the input is empty";
  } else if (p.batch > std::numeric_limits<int32_t>::max() || p.height > std::numeric_limits<int32_t>::max() / 512 / p.width) {
    reason << "a size beyond 31 bits";
  } else if (block_kernels(p, device).empty()) {
    reason << "a row of " << p.width << " pixels is too wide for the whole block's kernels on this GPU";
  }
  return reason.str();
}

// In how many steps a strip is computed, for the least time by a model: blocks run in waves, and each computes two rows of the
// first layer before its first step.
int64_t steps_of_strip(const Kernel& k, const BlockProblem& p, const DeviceProperties& device, int64_t rows) {
  constexpr double START = 0.4;  // of a step
  const int64_t steps = ceil_div(p.height, rows);
  const int64_t resident = std::max<int64_t>(
      1, std::min(k.blocks_by_registers, device.shared_per_multiprocessor / (k.shared_bytes(rows, p.width) + RESERVED)));
  int64_t best = steps;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t own = steps; own > 0; --own) {
    const int64_t blocks = p.batch * ceil_div(steps, own);
    const double time = double(ceil_div(blocks, resident * device.multiprocessors)) * (double(own) + START);
    if (time < least) least = time, best = own;
  }
  return best;
}

}  // namespace

int64_t block_weight_bytes(const BlockProblem& p) {
  const int64_t main = p.inner_channels * (p.channels + 9 * p.inner_channels + p.out_channels);
  return 2 * (main + (p.projected ? p.channels * p.out_channels : 0));
}

int64_t block_bias_floats(const BlockProblem& p) { return 2 * p.inner_channels + (p.projected ? 2 : 1) * p.out_channels; }

std::vector<std::string> block_kernels(const BlockProblem& p, const DeviceProperties& device) {
  std::vector<std::string> names;
  for (const bool resident : {true, false})
    for (const Kernel& k : KERNELS)
      if (k.resident == resident && matches(k, p) && rows_of_step(k, p, device) > 0) names.push_back(k.name);
  return names;
}

BlockPlan plan_block(const BlockProblem& p, const DeviceProperties& device, const std::string& kernel) {
  const std::string reason = why_not(p, device);
  if (!reason.empty()) refuse(reason);
  const std::vector<std::string> names = block_kernels(p, device);
  const std::string& name = kernel.empty() ? names.front() : kernel;
  if (std::find(names.begin(), names.end(), name) == names.end()) refuse("no kernel " + name + " for this problem on this GPU");
  const Kernel& k = *std::find_if(KERNELS.begin(), KERNELS.end(), [&](const Kernel& each) { return name == each.name; });
  const int64_t rows = rows_of_step(k, p, device), own = steps_of_strip(k, p, device, rows);
  BlockParams q{};
  q.pixels = int32_t(p.height * p.width), q.width = int32_t(p.width);
  q.rows = int32_t(rows), q.steps = int32_t(ceil_div(p.height, rows)), q.steps_per_strip = int32_t(own);
  q.ring_rows = int32_t(rows + HALO_ROWS), q.ring_pitch = int32_t(k.ring_pitch(p.width));
  const uint32_t strips = uint32_t(ceil_div(q.steps, own));
  return {{name, {uint32_t(p.batch), strips, 1}, uint32_t(32 * k.warps), uint32_t(k.shared_bytes(rows, p.width))}, q};
}

BlockParams with_pointers(const BlockPlan& plan, const BlockPointers& pointers) {
  BlockParams q = plan.params;
  q.x = pointers.x, q.weight = pointers.weight, q.bias = static_cast<const float*>(pointers.bias), q.y = pointers.y;
  return q;
}

}  // namespace resnet_fused
