// All kernels and the tables of their entry points: what scalar.cpp, avx2.cpp and avx512.cpp compile, each for its instruction
// set, between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "average_pool.h"
#include "batch_norm.h"
#include "blocks.h"
#include "direct.h"
#include "group_lanes.h"
#include "grouped.h"
#include "input_gradient.h"
#include "pack.h"
#include "pass.h"
#include "peak.h"
#include "pointwise.h"
#include "stem.h"
#include "weight_gradient.h"
#include "weight_gradient_winograd.h"
#include "winograd.h"

namespace resnet_fused::cpu::RF_ISA {

constexpr Kernels KERNELS{
    LANES,
    pack,
    transform_packed,
    transformed_size,
    winograd,
    weight_gradient_winograd,
    stem,
    average_pool,
    pass,
    pack_grouped,
    grouped_size,
    grouped,
    {pointwise, direct, bottleneck, basic_block, weight_gradient, input_gradient, multiply_add_loop},
    {bn_statistics, bn_apply, bn_backward_reduce, bn_backward_apply},
};

}  // namespace resnet_fused::cpu::RF_ISA
