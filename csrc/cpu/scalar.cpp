// All kernels in plain C++, for every target.
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

#define RF_ISA scalar
#define RF_VECTORS "simd/scalar.h"
#define RF_PRODUCTS "simd/products_float32.h"

#include "isa_kernels.h"

namespace resnet_fused::cpu {

extern const Kernels scalar_kernels = RF_ISA::KERNELS;

}  // namespace resnet_fused::cpu
