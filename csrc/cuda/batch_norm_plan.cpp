#include "batch_norm_plan.h"

#include <algorithm>
#include <array>

namespace resnet_fused {
namespace {

constexpr int64_t THREADS = 256;                  // as compiled: BATCH_NORM_THREADS
constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 8;  // of 256 threads: all that an SM holds
constexpr int64_t ROWS_PER_THREAD = 4;            // at least, where there are that many
constexpr int64_t MAX_GROUPS = 512;               // partial sums of a channel

constexpr std::array NAMES = {"bn_statistics", "bn_apply_fwd", "bn_reduce_bwd", "bn_apply_bwd", "bn_apply_activated_fwd"};

}  // namespace

BatchNormPlan plan_batch_norm(BatchNormPass pass, int64_t rows, int64_t channels, ElementType type,
                              const DeviceProperties& device) {
  const int64_t vector = 16 / element_bytes(type);
  const bool scalar = channels % vector != 0;
  const int64_t columns_in_all = scalar ? channels : channels / vector;
  int64_t columns = 1;
  while (columns < columns_in_all && columns < 32) columns *= 2;
  const int64_t blocks_x = ceil_div(columns_in_all, columns), lines = THREADS / columns;
  const int64_t resident = std::max<int64_t>(1, BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors / blocks_x);
  const int64_t groups = std::clamp<int64_t>(ceil_div(rows, lines * ROWS_PER_THREAD), 1, std::min(resident, MAX_GROUPS));

  BatchNormPlan plan{};
  plan.params.rows = rows;
  plan.params.channels = int32_t(channels);
  plan.params.columns = int32_t(columns);
  plan.params.groups = int32_t(groups);
  const std::string name = NAMES.at(size_t(pass));
  plan.launches.push_back(
      {name + "_" + suffix(type) + (scalar ? "_scalar" : ""), {uint32_t(blocks_x), uint32_t(groups), 1}, THREADS, 0});
  if (pass == BatchNormPass::statistics || pass == BatchNormPass::reduce_bwd) {
    constexpr int64_t FINISH_CHANNELS = 8;
    plan.workspace_bytes = groups * 2 * channels * int64_t(sizeof(float));
    plan.launches.push_back({name + "_finish", {uint32_t(ceil_div(channels, FINISH_CHANNELS)), 1, 1}, THREADS, 0});
  }
  return plan;
}

KernelLaunch plan_add_relu(bool backward, int64_t count, ElementType type, const DeviceProperties& device) {
  const int64_t vectors = ceil_div(count, 16 / element_bytes(type));
  const int64_t blocks = std::min(ceil_div(vectors, THREADS), BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors);
  return {std::string(backward ? "add_relu_bwd_" : "add_relu_fwd_") + suffix(type), {uint32_t(blocks), 1, 1}, THREADS, 0};
}

}  // namespace resnet_fused
