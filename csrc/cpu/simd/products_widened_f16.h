// What the direct kernels sum over where activations are float16: float32 numbers, since sums of float16 would round. Pixels are
// widened as they are copied into blocks, weights are float32, and results are rounded as they are stored.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

using Activation = F16;
using Unit = F16;
constexpr int64_t CHANNELS_PER_UNIT = 1;

RF_INLINE vec multiply_add(vec a, vec b, vec acc) { return fma(a, b, acc); }

}  // namespace resnet_fused::cpu::RF_ISA
