// Plain C++, for any target: vectors of 4 float32 numbers, which a compiler may keep in a register.
// Its kernels are right, and not fast: the Python side chooses them for no problem.
#pragma once

namespace resnet_fused::cpu::RF_ISA {

struct vec {
  float lane[4];
};
constexpr int LANES = 4;
constexpr int MAX_ROWS = 4;  // at most LANES: weight_gradient.h packs a tile's rows in a vector

// f(i) for each lane i.
template <class F>
RF_INLINE vec each_lane(F&& f) {
  vec a;
  for (int i = 0; i < LANES; ++i) a.lane[i] = f(i);
  return a;
}

RF_INLINE vec splat(float a) {
  return each_lane([&](int) { return a; });
}
RF_INLINE vec zero() { return splat(0.0f); }
RF_INLINE vec load(const float* p, int lanes) {
  return each_lane([&](int i) { return i < lanes ? p[i] : 0.0f; });
}
RF_INLINE void store(float* p, vec a, int lanes) {
  for (int i = 0; i < lanes; ++i) p[i] = a.lane[i];
}
RF_INLINE vec load(const float* p) { return load(p, LANES); }
RF_INLINE void store(float* p, vec a) { store(p, a, LANES); }
RF_INLINE vec add(vec a, vec b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
RF_INLINE vec sub(vec a, vec b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
RF_INLINE vec mul(vec a, vec b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
RF_INLINE vec fma(vec a, vec b, vec c) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
RF_INLINE vec fnma(vec a, vec b, vec c) {
  return each_lane([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
}
// A NaN in `value` survives.
RF_INLINE vec max_keeping_nan(vec floor, vec value) {
  return each_lane([&](int i) { return floor.lane[i] > value.lane[i] ? floor.lane[i] : value.lane[i]; });
}
RF_INLINE vec min_keeping_nan(vec ceiling, vec value) {
  return each_lane([&](int i) { return ceiling.lane[i] < value.lane[i] ? ceiling.lane[i] : value.lane[i]; });
}
RF_INLINE vec divide(vec a, vec b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
RF_INLINE vec nearest(vec a) {
  return each_lane([&](int i) { return std::nearbyint(a.lane[i]); });
}
// a 2^n for whole n from -126 to 128.
RF_INLINE vec times_power_of_two(vec a, vec n) {
  return each_lane(
      [&](int i) { return n.lane[i] != n.lane[i] ? n.lane[i] : std::ldexp(a.lane[i], static_cast<int>(n.lane[i])); });
}
RF_INLINE vec magnitude(vec a) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]); });
}
// The larger of two magnitudes; a NaN of either wins.
RF_INLINE vec larger(vec a, vec b) {
  return each_lane([&](int i) { return a.lane[i] >= b.lane[i] || a.lane[i] != a.lane[i] ? a.lane[i] : b.lane[i]; });
}
// Lane i of the result is lane order[i] of a.
RF_INLINE vec permute(vec a, const int32_t* order) {
  return each_lane([&](int i) { return a.lane[order[i]]; });
}
// a in the first `lanes`, b in the others.
RF_INLINE vec blend(vec a, vec b, int lanes) {
  return each_lane([&](int i) { return i < lanes ? a.lane[i] : b.lane[i]; });
}
// Whether a lane is above the limit, or NaN.
RF_INLINE bool any_above(vec a, float limit) {
  bool found = false;
  for (int i = 0; i < LANES; ++i) found = found || !(a.lane[i] <= limit);
  return found;
}

RF_INLINE float from_bfloat16(Bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// Round to nearest even; a NaN stays a quiet NaN.
RF_INLINE Bf16 to_bfloat16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return {a != a ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
RF_INLINE vec splat(Bf16 a) { return splat(from_bfloat16(a)); }
RF_INLINE vec load(const Bf16* p, int lanes) {
  return each_lane([&](int i) { return i < lanes ? from_bfloat16(p[i]) : 0.0f; });
}
RF_INLINE void store(Bf16* p, vec a, int lanes) {
  for (int i = 0; i < lanes; ++i) p[i] = to_bfloat16(a.lane[i]);
}
RF_INLINE vec load(const Bf16* p) { return load(p, LANES); }
RF_INLINE void store(Bf16* p, vec a) { store(p, a, LANES); }

RF_INLINE float widen(F16 a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16, exponent = a.bits >> 10 & 31u, fraction = a.bits & 1023u;
  float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24: subnormal numbers
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (exponent != 0) bits = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// Round to nearest even; a NaN stays a quiet NaN.
RF_INLINE F16 to_float16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (a != a) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520, which rounds to infinity
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: subnormal numbers, multiples of 2^-24
    half = static_cast<uint32_t>(std::nearbyint(std::fabs(a) * 16777216.0f));
  } else {
    half = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112u << 10);
  }
  return {static_cast<uint16_t>(sign | half)};
}
RF_INLINE vec splat(F16 a) { return splat(widen(a)); }
RF_INLINE vec load(const F16* p, int lanes) {
  return each_lane([&](int i) { return i < lanes ? widen(p[i]) : 0.0f; });
}
RF_INLINE void store(F16* p, vec a, int lanes) {
  for (int i = 0; i < lanes; ++i) p[i] = to_float16(a.lane[i]);
}
RF_INLINE vec load(const F16* p) { return load(p, LANES); }
RF_INLINE void store(F16* p, vec a) { store(p, a, LANES); }
// Infinity of a's sign where its magnitude is at least `limit`.
RF_INLINE vec infinite_from(vec a, float limit) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]) >= limit ? a.lane[i] * __builtin_inff() : a.lane[i]; });
}

// dy where y is positive, or NaN as in stock PyTorch; zero elsewhere.
RF_INLINE vec through_relu(vec y, vec dy) {
  return each_lane([&](int i) { return y.lane[i] <= 0 ? 0.0f : dy.lane[i]; });
}
// Zero beyond the first `lanes`.
RF_INLINE vec first_lanes(vec a, int lanes) {
  return each_lane([&](int i) { return i < lanes ? a.lane[i] : 0.0f; });
}

}  // namespace resnet_fused::cpu::RF_ISA
