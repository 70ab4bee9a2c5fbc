// All kernels and the table of their entry points: what avx512.cpp and avx2.cpp compile, each for its instruction set, between
// RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "simd.h"
// simd.h comes first: it defines the vector type that the others use.
#include "peak.h"
#include "tile.h"
#include "pack.h"
#include "winograd_transforms.h"
#include "winograd_grid.h"
#include "uneven.h"
#include "winograd_stages.h"
#include "winograd_few.h"
#include "winograd.h"
#include "pointwise.h"
#include "direct.h"
#include "input_gradient.h"
#include "row_buffer.h"
#include "stem.h"
#include "average_pool.h"
#include "blocks.h"
#include "weight_gradient_tile.h"
#include "weight_gradient_winograd.h"
#include "weight_gradient.h"

namespace resnet_fused::cpu::RF_ISA {

inline const Kernels& kernel_table() {
  static const Kernels kernels{LANES,        pack,       transform_packed, transformed_size, winograd,       pointwise,        direct, stem,
                               average_pool, bottleneck, basic_block,      weight_gradient,  input_gradient, multiply_add_loop};
  return kernels;
}

}  // namespace resnet_fused::cpu::RF_ISA
