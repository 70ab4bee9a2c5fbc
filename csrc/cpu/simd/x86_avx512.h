// AVX-512: vectors of 16 float32 numbers.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

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
RF_INLINE vec min_keeping_nan(vec ceiling, vec value) { return _mm512_min_ps(ceiling, value); }
RF_INLINE vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
RF_INLINE vec nearest(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a 2^n for whole n from -126 to 128.
RF_INLINE vec times_power_of_two(vec a, vec n) { return _mm512_scalef_ps(a, n); }

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
// Lane i of the result is lane order[i] of a.
RF_INLINE vec permute(vec a, const int32_t* order) { return _mm512_permutexvar_ps(_mm512_loadu_si512(order), a); }
// a in the first `lanes`, b in the others.
RF_INLINE vec blend(vec a, vec b, int lanes) { return _mm512_mask_mov_ps(b, lane_mask(lanes), a); }
RF_INLINE vec load(const float* p, int lanes) { return _mm512_maskz_loadu_ps(lane_mask(lanes), p); }
RF_INLINE void store(float* p, vec a, int lanes) { _mm512_mask_storeu_ps(p, lane_mask(lanes), a); }

RF_INLINE vec widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
RF_INLINE vec splat(Bf16 a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<short>(a.bits)), 16));
}
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
// vcvtph2ps and vcvtps2ph keep subnormals and NaNs, whatever MXCSR says.
RF_INLINE float widen(F16 a) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits))); }
RF_INLINE vec splat(F16 a) { return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits))); }
RF_INLINE __m256i to_float16(vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RF_INLINE vec load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
RF_INLINE vec load(const F16* p, int lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(lanes), p)); }
RF_INLINE void store(F16* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(a)); }
RF_INLINE void store(F16* p, vec a, int lanes) { _mm256_mask_storeu_epi16(p, lane_mask(lanes), to_float16(a)); }
// Infinity of a's sign where its magnitude is at least `limit`.
RF_INLINE vec infinite_from(vec a, float limit) {
  return _mm512_mask_mul_ps(a, _mm512_cmp_ps_mask(magnitude(a), splat(limit), _CMP_GE_OQ), a, splat(__builtin_inff()));
}
// dy where y is positive, or NaN as in stock PyTorch; zero elsewhere.
RF_INLINE vec through_relu(vec y, vec dy) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), dy); }
// Zero beyond the first `lanes`.
RF_INLINE vec first_lanes(vec a, int lanes) { return _mm512_maskz_mov_ps(lane_mask(lanes), a); }

}  // namespace resnet_fused::cpu::RF_ISA
