// The table of instruction sets, for all targets, and which entry is used.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace resnet_fused::cpu {

extern const Kernels scalar_kernels;
extern const DirectKernels scalar_widened_bf16_kernels;
extern const DirectKernels scalar_widened_f16_kernels;
#if RF_X86_64
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const DirectKernels avx2_widened_bf16_kernels;
extern const DirectKernels avx2_widened_f16_kernels;
extern const DirectKernels avx512_widened_bf16_kernels;
extern const DirectKernels avx512_widened_f16_kernels;
extern const DirectKernels avx512_bf16_kernels;
#endif

namespace {

// In the order of Isa.
const InstructionSet INSTRUCTION_SETS[] = {
    {Isa::scalar, scalar_kernels, scalar_widened_bf16_kernels, scalar_widened_f16_kernels, nullptr},
#if RF_X86_64
    {Isa::avx2, avx2_kernels, avx2_widened_bf16_kernels, avx2_widened_f16_kernels, nullptr},
    {Isa::avx512, avx512_kernels, avx512_widened_bf16_kernels, avx512_widened_f16_kernels, &avx512_bf16_kernels},
#endif
};

}  // namespace

const InstructionSet& instruction_set() { return INSTRUCTION_SETS[static_cast<size_t>(detected_isa())]; }

const DirectKernels& direct_kernels(DType dtype, DType weights) {
  const InstructionSet& set = instruction_set();
  if (dtype == DType::float32) return set.kernels.float32;
  if (dtype == DType::float16) return set.widened_f16;
  return weights == DType::float32 ? set.widened_bf16 : *set.bfloat16;
}

std::vector<int64_t> built_instruction_sets() {
  std::vector<int64_t> found;
  for (const InstructionSet& set : INSTRUCTION_SETS) found.push_back(static_cast<int64_t>(set.isa));
  return found;
}

}  // namespace resnet_fused::cpu
