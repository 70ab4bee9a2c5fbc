// All kernels, compiled for AVX-512.
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

#define RF_ISA avx512
#define RF_ISA_IS_AVX512 1
RF_ISA_AVX512_BEGIN

#include "isa_kernels.h"

namespace resnet_fused::cpu {

const Kernels& avx512_kernels() { return RF_ISA::kernel_table(); }

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
