// Batch norm kernels, compiled for AVX2 with FMA.
#include "isa.h"

#if RF_X86_64

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "bn_params.h"
#include "runtime.h"

#define RF_ISA avx2
#define RF_ISA_IS_AVX2 1
RF_ISA_AVX2_BEGIN

#include "simd.h"
// simd.h comes first: it defines the vector type that the others use.
#include "bn_sweep.h"
#include "bn_reduce.h"
#include "bn.h"

namespace resnet_fused::cpu {

const BnKernels& bn_avx2_kernels() {
  static const BnKernels kernels = RF_ISA::bn_kernels();
  return kernels;
}

}  // namespace resnet_fused::cpu

RF_ISA_END

#endif
