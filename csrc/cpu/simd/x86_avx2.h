// AVX2 with FMA: vectors of 8 float32 numbers.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

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
RF_INLINE vec min_keeping_nan(vec ceiling, vec value) { return _mm256_min_ps(ceiling, value); }
RF_INLINE vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
RF_INLINE vec nearest(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a 2^n for whole n from -126 to 128.
RF_INLINE vec times_power_of_two(vec a, vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

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
// Lane i of the result is lane order[i] of a.
RF_INLINE vec permute(vec a, const int32_t* order) {
  return _mm256_permutevar8x32_ps(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order)));
}
// a in the first `lanes`, b in the others.
RF_INLINE vec blend(vec a, vec b, int lanes) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(lane_mask(lanes))); }
RF_INLINE vec load(const float* p, int lanes) { return _mm256_maskload_ps(p, lane_mask(lanes)); }
RF_INLINE void store(float* p, vec a, int lanes) { _mm256_maskstore_ps(p, lane_mask(lanes), a); }

RF_INLINE vec widen(__m128i halves) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)); }
RF_INLINE vec splat(Bf16 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<short>(a.bits)), 16));
}
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
// vcvtph2ps and vcvtps2ph keep subnormals and NaNs, whatever MXCSR says.
RF_INLINE float widen(F16 a) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits))); }
RF_INLINE vec splat(F16 a) { return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits))); }
RF_INLINE vec load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
RF_INLINE void store(F16* p, vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RF_INLINE vec load(const F16* p, int lanes) {
  F16 buffer[LANES] = {};
  __builtin_memcpy(buffer, p, sizeof(F16) * static_cast<unsigned>(lanes));
  return load(buffer);
}
RF_INLINE void store(F16* p, vec a, int lanes) {
  F16 buffer[LANES];
  store(buffer, a);
  __builtin_memcpy(p, buffer, sizeof(F16) * static_cast<unsigned>(lanes));
}
// Infinity of a's sign where its magnitude is at least `limit`.
RF_INLINE vec infinite_from(vec a, float limit) {
  return _mm256_blendv_ps(a, mul(a, splat(__builtin_inff())), _mm256_cmp_ps(magnitude(a), splat(limit), _CMP_GE_OQ));
}
// dy where y is positive, or NaN as in stock PyTorch; zero elsewhere.
RF_INLINE vec through_relu(vec y, vec dy) { return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_NLE_UQ), dy); }
// Zero beyond the first `lanes`.
RF_INLINE vec first_lanes(vec a, int lanes) { return _mm256_and_ps(_mm256_castsi256_ps(lane_mask(lanes)), a); }

}  // namespace resnet_fused::cpu::RF_ISA
