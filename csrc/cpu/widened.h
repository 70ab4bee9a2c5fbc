// What serves bfloat16 and float16 in float32 arithmetic: the direct kernels on activations that are widened as they are copied.
// Training has none of it.
#pragma once

#include "blocks.h"
#include "direct.h"
#include "peak.h"
#include "pointwise.h"

namespace resnet_fused::cpu::RF_ISA {

constexpr DirectKernels WIDENED_KERNELS{pointwise, direct, bottleneck, basic_block, nullptr, nullptr, multiply_add_loop};

}  // namespace resnet_fused::cpu::RF_ISA
