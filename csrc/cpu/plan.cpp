#include "../checks.h"
#include "plan.h"

namespace resnet_fused::cpu {

WinogradPlan winograd_plan(const ConvParams& p, const std::vector<int64_t>& numbers) {
  const bool stride_2 = p.stride_h == 2 && p.stride_w == 2, stride_1 = p.stride_h == 1 && p.stride_w == 1;
  RF_CHECK(p.kernel_h == 3 && p.kernel_w == 3 && p.pad_h == 1 && p.pad_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
               (stride_1 || stride_2),
           "Winograd serves 3 x 3 convolutions of padding and dilation 1 and stride 1 or 2; give an empty plan.");
  RF_CHECK(stride_1 || p.in_channels % 16 == 0, "Winograd of stride 2 needs in_channels to be a multiple of 16, not ",
           p.in_channels, "; give an empty plan.");
  RF_CHECK(numbers.size() == 5, "plan has ", numbers.size(),
           " numbers; it must have five: output tile, tiles, panels, channel chunk, by panels.");
  const WinogradPlan plan{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4] != 0};
  RF_CHECK(stride_2 ? plan.output_tile == 5 : plan.output_tile == 2 || plan.output_tile == 4, "plan's output tile is ",
           plan.output_tile, "; it must be 2 or 4, or for stride 2, 5.");
  RF_CHECK(plan.tiles > 0 && plan.panels > 0 && plan.channel_chunk > 0 && plan.channel_chunk % 16 == 0,
           "plan's tiles, panels and channel chunk must be positive, the chunk a multiple of 16.");
  return plan;
}

}  // namespace resnet_fused::cpu
