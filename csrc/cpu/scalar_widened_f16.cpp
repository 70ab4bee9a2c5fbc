// Direct sums of float16 in float32 arithmetic, and whole blocks that contain them, in plain C++, for every target.
#include "isa.h"

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

#define RF_ISA scalar_widened_f16
#define RF_VECTORS "simd/scalar.h"
#define RF_PRODUCTS "simd/products_widened_f16.h"

#include "widened.h"

namespace resnet_fused::cpu {

extern const DirectKernels scalar_widened_f16_kernels = RF_ISA::WIDENED_KERNELS;

}  // namespace resnet_fused::cpu
