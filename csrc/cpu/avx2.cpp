// All kernels, compiled for AVX2 with FMA.
#include "isa.h"

#if RF_X86_64

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "params.h"
#include "runtime.h"

#define RF_ISA avx2
#define RF_ISA_IS_AVX2 1
RF_ISA_AVX2_BEGIN

#include "simd.h"
// simd.h comes first: it defines the vector type that the others use.
#include "peak.h"
#include "tile.h"
#include "pack.h"
#include "winograd_transforms.h"
#include "winograd_grid.h"
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

namespace resnet_fused::cpu {

const Kernels& avx2_kernels() {
  using namespace RF_ISA;
  static const Kernels kernels{LANES,        pack,       transform_packed, transformed_size, winograd,       pointwise,        direct, stem,
                               average_pool, bottleneck, basic_block,      weight_gradient,  input_gradient, multiply_add_loop};
  return kernels;
}

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
