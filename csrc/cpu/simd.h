// One vector type for the instruction set under compilation, so that each kernel is written once.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END, with RF_ISA naming the namespace: avx512, avx2 or avx512_bf16. The last
// serves direct convolutions of bfloat16 activations with vdpbf16ps.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

#if defined(RF_ISA_IS_AVX512)

using vec = __m512;
constexpr int LANES = 16;
constexpr int MAX_ROWS = 14;  // 14 x 2 accumulators, two weight vectors, one broadcast: 31 of 32 registers

RF_INLINE vec zero() { return _mm512_setzero_ps(); }
RF_INLINE vec splat(float a) { return _mm512_set1_ps(a); }
RF_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
RF_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
RF_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
RF_INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
RF_INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
RF_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
RF_INLINE vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// vmaxps returns its second operand when either is NaN: `value` goes second, so that a NaN in it survives.
RF_INLINE vec max_keeping_nan(vec floor, vec value) { return _mm512_max_ps(floor, value); }

RF_INLINE vec magnitude(vec a) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
// The larger of two magnitudes; a NaN of either wins: as integers, the NaNs are above all numbers.
RF_INLINE vec larger(vec a, vec b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
// Whether a lane is above the limit, or NaN.
RF_INLINE bool any_above(vec a, float limit) { return _mm512_cmp_ps_mask(a, splat(limit), _CMP_NLE_UQ) != 0; }

RF_INLINE __mmask16 lane_mask(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
RF_INLINE vec load(const float* p, int lanes) { return _mm512_maskz_loadu_ps(lane_mask(lanes), p); }
RF_INLINE void store(float* p, vec a, int lanes) { _mm512_mask_storeu_ps(p, lane_mask(lanes), a); }

RF_INLINE vec widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
// Round to nearest even in integer arithmetic (vcvtneps2bf16 would flush subnormals); a NaN stays a quiet NaN.
RF_INLINE __m256i narrow(vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
RF_INLINE vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
RF_INLINE vec load(const Bf16* p, int lanes) { return widen(_mm256_maskz_loadu_epi16(lane_mask(lanes), p)); }
RF_INLINE void store(Bf16* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
RF_INLINE void store(Bf16* p, vec a, int lanes) { _mm256_mask_storeu_epi16(p, lane_mask(lanes), narrow(a)); }

#else

using vec = __m256;
constexpr int LANES = 8;
constexpr int MAX_ROWS = 6;  // 6 x 2 accumulators, two weight vectors, one broadcast: 15 of 16 registers

RF_INLINE vec zero() { return _mm256_setzero_ps(); }
RF_INLINE vec splat(float a) { return _mm256_set1_ps(a); }
RF_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
RF_INLINE void store(float* p, vec a) { _mm256_storeu_ps(p, a); }
RF_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
RF_INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
RF_INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
RF_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
RF_INLINE vec fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
// vmaxps returns its second operand when either is NaN: `value` goes second, so that a NaN in it survives.
RF_INLINE vec max_keeping_nan(vec floor, vec value) { return _mm256_max_ps(floor, value); }

RF_INLINE vec magnitude(vec a) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)));
}
// The larger of two magnitudes; a NaN of either wins: as integers, the NaNs are above all numbers.
RF_INLINE vec larger(vec a, vec b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
// Whether a lane is above the limit, or NaN.
RF_INLINE bool any_above(vec a, float limit) { return _mm256_movemask_ps(_mm256_cmp_ps(a, splat(limit), _CMP_NLE_UQ)) != 0; }

RF_INLINE __m256i lane_mask(int lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RF_INLINE vec load(const float* p, int lanes) { return _mm256_maskload_ps(p, lane_mask(lanes)); }
RF_INLINE void store(float* p, vec a, int lanes) { _mm256_maskstore_ps(p, lane_mask(lanes), a); }

RF_INLINE vec widen(__m128i halves) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)); }
// Round to nearest even in integer arithmetic; a NaN stays a quiet NaN.
RF_INLINE __m128i narrow(vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
RF_INLINE vec load(const Bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
RF_INLINE void store(Bf16* p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
RF_INLINE vec load(const Bf16* p, int lanes) {
  Bf16 buffer[LANES] = {};
  __builtin_memcpy(buffer, p, sizeof(Bf16) * static_cast<unsigned>(lanes));
  return load(buffer);
}
RF_INLINE void store(Bf16* p, vec a, int lanes) {
  Bf16 buffer[LANES];
  store(buffer, a);
  __builtin_memcpy(p, buffer, sizeof(Bf16) * static_cast<unsigned>(lanes));
}

#endif

// ---- What the direct kernels sum over ---------------------------------------------------------------------------------
// They see activations and weights as 32-bit units: one float32 channel, or a pair of bfloat16 channels, which vdpbf16ps
// multiplies and adds at once. Addresses and copies are then the same for both.
#if defined(RF_ISA_IS_BF16)
using Activation = Bf16;
constexpr int64_t CHANNELS_PER_UNIT = 2;
// acc += a.even * b.even + a.odd * b.odd
RF_INLINE vec multiply_add(vec a, vec b, vec acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#else
using Activation = float;
constexpr int64_t CHANNELS_PER_UNIT = 1;
RF_INLINE vec multiply_add(vec a, vec b, vec acc) { return fma(a, b, acc); }
#endif

RF_INLINE vec max_magnitude(vec a, vec b) { return larger(magnitude(a), magnitude(b)); }

RF_INLINE float widen(float a) { return a; }
RF_INLINE float widen(Bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Output channels of one panel of packed weights: the two vectors of a register tile.
constexpr int PANEL = 2 * LANES;

RF_INLINE int64_t vector_count(int64_t channels) { return (channels + LANES - 1) / LANES; }
RF_INLINE int64_t panel_count(int64_t channels) { return (channels + PANEL - 1) / PANEL; }

RF_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
RF_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
RF_INLINE void prefetch_for_write(const void* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace resnet_fused::cpu::RF_ISA
