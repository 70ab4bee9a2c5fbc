#include "stem_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace resnet_fused {
namespace {

using Tile = StemPoolTile;

struct Kernel {
  const char* name;
  ElementType type;
  StemInput input;
  int64_t groups, staged_bytes;  // of rows of x in shared memory; of a pixel

  int64_t shared_bytes(const StemProblem& p) const {
    const int64_t tiles = ceil_div(p.conv_width(), Tile::TILE);
    return groups * Tile::GROUP_LINES * Tile::row_pitch(tiles) + staged_bytes * p.width +
           Tile::WARPS * tiles * Tile::KEPT_BYTES;
  }
};

constexpr std::array KERNELS = {
#define RF_ENTRY(NAME, ELEMENT, INPUT) \
  Kernel{#NAME, ElementType::ELEMENT, StemInput::INPUT, STEM_GROUPS<StemInput::INPUT>, STEM_STAGED_BYTES<StemInput::INPUT>},
    RF_STEM_KERNELS(RF_ENTRY)
#undef RF_ENTRY
};

const Kernel* kernel_for(const StemProblem& p, StemInput input) {
  const auto found =
      std::find_if(KERNELS.begin(), KERNELS.end(), [&](const Kernel& k) { return k.type == p.type && k.input == input; });
  return found == KERNELS.end() ? nullptr : &*found;
}

// Why the kernel can't serve the problem; empty if it can. k: null for dtypes without one.
std::string why_not(const Kernel* k, const StemProblem& p, const StemStrides& strides, const DeviceProperties& device) {
  constexpr int64_t VECTOR = 8, MOST_STRIPS = 65535;  // elements of 16 bytes; blocks in y of a grid
  std::ostringstream reason;
  if (k == nullptr) {
    reason << "with its pool it serves float16 and bfloat16";
  } else if (p.out_channels != Tile::CHANNELS) {
    reason << "with its pool it serves " << Tile::CHANNELS << " output channels, not " << p.out_channels;
  } else if (device.compute_capability < 80) {
    reason << "with its pool it needs compute capability 8.0 or newer, not " << double(device.compute_capability) / 10;
  } else if (p.batch <= 0 || p.height <= 0 || p.width <= 0) {
    reason << "the input is empty";
  } else if (p.width % VECTOR != 0 || strides.image % VECTOR != 0 || strides.channel % VECTOR != 0 ||
             strides.row % VECTOR != 0) {
    reason << "with its pool it serves rows of whole 16 bytes, so a width that is a multiple of " << VECTOR << ", not "
           << p.width;
  } else if (p.batch > std::numeric_limits<int32_t>::max() || p.height > 4 * MOST_STRIPS) {
    reason << "a size beyond the grid's";
  } else if (k->shared_bytes(p) > device.shared_per_block) {
    reason << "a row of " << p.width << " pixels is too wide for it with its pool on this GPU";
  }
  return reason.str();
}

// Rows of the result of a strip, by their time in a model: a block begins with a row of the convolution, rows of x and the
// weights, and a few blocks at once keep a multiprocessor's tensor cores busy.
std::vector<int64_t> rows_of_strips(const Kernel& k, const StemProblem& p, const DeviceProperties& device) {
  constexpr double START = 1.0;       // of a row of the result
  constexpr int64_t RESERVED = 1024;  // bytes the system takes of a block's shared memory
  constexpr int64_t BUSY = 3;         // blocks
  constexpr size_t MOST = 4;
  const int64_t by_memory = device.shared_per_multiprocessor / (k.shared_bytes(p) + RESERVED);
  const double at_once = double(std::max<int64_t>(1, std::min(BUSY, by_memory)));
  std::vector<std::pair<double, int64_t>> found;
  for (int64_t strips = 1; strips <= p.pooled_height(); ++strips) {
    const int64_t rows = ceil_div(p.pooled_height(), strips);
    if (!found.empty() && found.back().second == rows) continue;
    const int64_t blocks = ceil_div(p.batch * strips, device.multiprocessors);
    found.emplace_back((double(rows) + START) * std::max(1.0, double(blocks) / at_once), rows);
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<int64_t> best;
  for (const auto& [time, rows] : found)
    if (best.size() < MOST) best.push_back(rows);
  return best;
}

}  // namespace

StemPlan plan_stem(const StemProblem& p, StemInput input, const StemStrides& strides, const DeviceProperties& device,
                   int64_t rows) {
  const Kernel* kernel = kernel_for(p, input);
  const std::string reason = why_not(kernel, p, strides, device);
  if (!reason.empty()) throw std::invalid_argument("stem: " + reason);
  rows = std::min(rows > 0 ? rows : rows_of_strips(*kernel, p, device).front(), p.pooled_height());
  const int64_t tiles = ceil_div(p.conv_width(), Tile::TILE), strips = ceil_div(p.pooled_height(), rows);
  const int64_t bytes = element_bytes(p.type);
  StemPlan plan{};
  plan.params.image_stride = strides.image * bytes;
  plan.params.channel_stride = strides.channel * bytes;
  plan.params.row_stride = strides.row * bytes;
  plan.params.height = int32_t(p.height), plan.params.width = int32_t(p.width);
  plan.params.conv_height = int32_t(p.conv_height()), plan.params.conv_width = int32_t(p.conv_width());
  plan.params.pooled_height = int32_t(p.pooled_height()), plan.params.pooled_width = int32_t(p.pooled_width());
  plan.params.rows_per_strip = int32_t(rows);
  plan.params.tiles = int32_t(tiles);
  plan.params.row_pitch = int32_t(Tile::row_pitch(tiles));
  plan.launch = {kernel->name, {uint32_t(p.batch), uint32_t(strips), 1}, Tile::THREADS, uint32_t(kernel->shared_bytes(p))};
  return plan;
}

std::vector<int64_t> stem_rows(const StemProblem& p, StemInput input, const DeviceProperties& device) {
  const Kernel* kernel = kernel_for(p, input);
  return kernel == nullptr ? std::vector<int64_t>{} : rows_of_strips(*kernel, p, device);
}

StemParams with_pointers(const StemPlan& plan, const StemPointers& pointers) {
  StemParams params = plan.params;
  params.x = pointers.x, params.weight = pointers.weight, params.y = pointers.y;
  params.bias = static_cast<const float*>(pointers.bias);
  return params;
}

}  // namespace resnet_fused
