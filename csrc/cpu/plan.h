// The check of a plan, by which a Winograd convolution is cut up. Plans are made by resnet_fused/backends/cpu/plan.py.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace resnet_fused::cpu {

// The five numbers of a WinogradPlan as given. Throws std::runtime_error for a plan that can't be carried out.
WinogradPlan winograd_plan(const ConvParams& p, const std::vector<int64_t>& numbers);

}  // namespace resnet_fused::cpu
