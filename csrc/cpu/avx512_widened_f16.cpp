// Direct sums of float16 in float32 arithmetic, and whole blocks that contain them, compiled for AVX-512.
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

#define RF_ISA avx512_widened_f16
#define RF_VECTORS "simd/x86_avx512.h"
#define RF_PRODUCTS "simd/products_widened_f16.h"
RF_ISA_AVX512_BEGIN

#include "widened.h"

namespace resnet_fused::cpu {

extern const DirectKernels avx512_widened_f16_kernels = RF_ISA::WIDENED_KERNELS;

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
