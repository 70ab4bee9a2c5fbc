// Direct sums of bfloat16, and whole blocks that contain them, compiled for AVX512_BF16.
#include "isa.h"

#if RF_X86_64

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "params.h"
#include "runtime.h"

#define RF_ISA avx512_bf16
#define RF_VECTORS "simd/x86_avx512.h"
#define RF_PRODUCTS "simd/products_avx512_bf16.h"
RF_ISA_AVX512_BF16_BEGIN

#include "blocks.h"
#include "direct.h"
#include "input_gradient.h"
#include "peak.h"
#include "pointwise.h"
#include "weight_gradient.h"

namespace resnet_fused::cpu {

extern const DirectKernels avx512_bf16_kernels{RF_ISA::pointwise,        RF_ISA::direct,          RF_ISA::bottleneck,
                                               RF_ISA::basic_block,      RF_ISA::weight_gradient, RF_ISA::input_gradient,
                                               RF_ISA::multiply_add_loop};

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
