// Instruction sets: which one the CPU has, and how a source file is compiled for one of them.
//
// The library is one binary for every CPU of a target. The kernels are headers, compiled once per instruction set by scalar.cpp,
// avx2.cpp and avx512.cpp, between RF_ISA_*_BEGIN and RF_ISA_END where it isn't the target's own; nothing is built with -march. System and PyTorch headers
// stand before BEGIN, so that no inline function of theirs is compiled for an instruction set the CPU may lack.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define RF_X86_64 1
#else
#define RF_X86_64 0
#endif

#define RF_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define RF_TARGET(features) RF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RF_ISA_END RF_PRAGMA(clang attribute pop)
#define RF_UNROLL(n) RF_PRAGMA(unroll n)
#else
// GCC instantiates templates at the end of the file, with the target in force there: it is never popped.
#define RF_TARGET(features) RF_PRAGMA(GCC target(features))
#define RF_ISA_END
#define RF_UNROLL(n) RF_PRAGMA(GCC unroll n)
#endif

// prfchw lets a prefetch for writing take the line from other cores at once; a CPU that doesn't know it does nothing.
#define RF_ISA_AVX2_BEGIN RF_TARGET("avx2,fma,f16c,prfchw")
#define RF_ISA_AVX512_BEGIN RF_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#define RF_ISA_AVX512_BF16_BEGIN RF_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")

#define RF_INLINE inline __attribute__((always_inline))

namespace resnet_fused::cpu {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this CPU and operating system offer and we have kernels for, within the limit.
Isa detected_isa();

// From now on nothing above `highest` is used; returns what is. For tests: weights packed before don't fit afterwards.
Isa limit_isa(Isa highest);

// Whether vdpbf16ps (AVX512_BF16) may be used.
bool has_avx512_bf16();

// Whether activations may be float16: the vectors in use convert it (F16C).
bool has_float16();

// Whether the CPU has AMX tiles for bfloat16, which oneDNN uses and we don't.
bool has_amx_bf16();

}  // namespace resnet_fused::cpu
