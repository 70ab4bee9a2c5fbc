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

#include "isa_kernels.h"

namespace resnet_fused::cpu {

const Kernels& avx2_kernels() { return RF_ISA::kernel_table(); }

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
