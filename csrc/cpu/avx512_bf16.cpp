// Direct bfloat16 convolutions, and whole blocks that contain them, compiled for AVX512_BF16.
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

#define RF_ISA avx512_bf16
#define RF_ISA_IS_AVX512 1
#define RF_ISA_IS_BF16 1
RF_ISA_AVX512_BF16_BEGIN

#include "simd.h"
// simd.h comes first: it defines the vector type that the others use.
#include "peak.h"
#include "tile.h"
#include "winograd_transforms.h"
#include "winograd_grid.h"
#include "uneven.h"
#include "winograd_stages.h"
#include "pointwise.h"
#include "direct.h"
#include "input_gradient.h"
#include "row_buffer.h"
#include "blocks.h"
#include "weight_gradient_tile.h"
#include "weight_gradient.h"

namespace resnet_fused::cpu {

const Bf16Kernels& avx512_bf16_kernels() {
  using namespace RF_ISA;
  static const Bf16Kernels kernels{pointwise, direct, bottleneck, basic_block, weight_gradient, input_gradient, multiply_add_loop};
  return kernels;
}

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
