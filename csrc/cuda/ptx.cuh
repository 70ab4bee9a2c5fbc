// Every inline-PTX instruction of the project, one wrapper each. Section numbers are those of NVIDIA's "PTX ISA".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnet_fused::ptx {

// 32-bit address of a shared-memory object, as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// %tid.x (10.1), read where this stands: a compiler moves what follows from threadIdx.x out of loops, and then keeps it.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// cp.async (9.7.9.25.3): copies 16 bytes from global memory to `shared` + OFFSET, past L1; writes zeros and reads
// nothing where !valid.
template <int OFFSET>
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16, %3;" ::"r"(shared), "n"(OFFSET), "l"(global),
               "r"(valid ? 16 : 0));
}

// cp.async.commit_group: the copies issued since the last call become one group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most PENDING of the latest groups are in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ld.shared, st.shared (9.7.9.8, 9.7.9.12) at an address of shared memory plus a constant number of bytes.
template <int OFFSET>
__device__ __forceinline__ uint32_t load_shared_4(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(shared), "n"(OFFSET));
  return v;
}
template <int OFFSET>
__device__ __forceinline__ float4 load_shared_16(uint32_t shared) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared), "n"(OFFSET));
  return v;
}
template <int OFFSET>
__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t word) {
  asm volatile("st.shared.u32 [%0 + %1], %2;" ::"r"(shared), "n"(OFFSET), "r"(word) : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void store_shared_8(uint32_t shared, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0 + %1], {%2, %3};" ::"r"(shared), "n"(OFFSET), "f"(x), "f"(y) : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void store_shared_16(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(shared), "n"(OFFSET), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ld.global.nc, st.global (9.7.9.9, 9.7.9.12): 16 bytes where valid; the load gives zeros elsewhere.
__device__ __forceinline__ uint4 load_global_16(const void* global, bool valid) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(global), "r"(int(valid)));
  return v;
}
__device__ __forceinline__ void store_global_16(void* global, uint4 v, bool valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(global), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(valid))
               : "memory");
}

// The same with .cs (9.7.9.2): for what nobody reads soon again, which gives its place in L2 up before other lines do.
__device__ __forceinline__ uint4 load_global_16_last(const void* global, bool valid) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(global), "r"(int(valid)));
  return v;
}
__device__ __forceinline__ void store_global_16_last(void* global, uint4 v, bool valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(global), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(valid))
               : "memory");
}
__device__ __forceinline__ void store_global_8_last(void* global, uint2 v, bool valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.cs.v2.u32 [%0], {%1, %2};}" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(int(valid))
               : "memory");
}

// max.NaN (9.7.3.12, 9.7.4.8): max(v, 0) that keeps NaN; two 16-bit elements or one float32 in a word.
template <class T>
__device__ __forceinline__ uint32_t relu_word(uint32_t word);
template <>
__device__ __forceinline__ uint32_t relu_word<__half>(uint32_t word) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0));
  return word;
#else
  return word & ~__hlt2_mask(reinterpret_cast<const __half2&>(word), __float2half2_rn(0.0f));
#endif
}
template <>
__device__ __forceinline__ uint32_t relu_word<__nv_bfloat16>(uint32_t word) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0));
  return word;
}
template <>
__device__ __forceinline__ uint32_t relu_word<float>(uint32_t word) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+r"(word) : "r"(0));
  return word;
#else
  return __uint_as_float(word) < 0.0f ? 0 : word;
#endif
}

// max.NaN (9.7.4.8): the larger of two 16-bit elements each, NaN where one of them is NaN.
template <class T>
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_word<__half>(uint32_t a, uint32_t b) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
template <>
__device__ __forceinline__ uint32_t max_word<__nv_bfloat16>(uint32_t a, uint32_t b) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// lop3 (9.7.8.6): the bits of a where the mask has ones, and those of b elsewhere.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(selected) : "r"(mask), "r"(a), "r"(b));
  return selected;
}

// prefetch (9.7.9.15): asks for the line of `global` to be brought into L2; holds no register.
__device__ __forceinline__ void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ldmatrix (9.7.15.5.15): four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit); lane i gives the address of row i %
// 8 of matrix i / 8 less OFFSET, and receives elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each.
template <int OFFSET>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared), "n"(OFFSET));
}

// mma (9.7.15.5): d += a b, a 16 rows, b 8 columns, 32 bytes of each along k, float32 accumulators.
// T = __half, __nv_bfloat16: m16n8k16; T = float: m16n8k8 on operands already rounded to tf32.
template <class T>
__device__ __forceinline__ void mma_16x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma_16x8<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with 16 bytes along k: m16n8k8 of 16-bit elements.
template <class T>
__device__ __forceinline__ void mma_16x8_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b);

template <>
__device__ __forceinline__ void mma_16x8_half<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

template <>
__device__ __forceinline__ void mma_16x8_half<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// cvt.rna.tf32 (9.7.9.21): float32 bits to the nearest tf32, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

}  // namespace resnet_fused::ptx
