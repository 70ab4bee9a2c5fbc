// Batch norm with residual add and ReLU: two passes forward, two backward. See docs/training.md.
// Included only between RF_ISA_*_BEGIN and RF_ISA_END.
#pragma once

#include "batch_norm_reduce.h"
#include "batch_norm_sweep.h"

namespace resnet_fused::cpu::RF_ISA {

// y = (x - mean) scale + shift. Not x scale + (shift - mean scale), which cancels where the mean is large.
struct ForwardTerms {
  ForwardTerms(const BatchNormShape& s, const BatchNormTensors& t)
      : mean(t.mean), scale(scratch.take<float>(s.channels)), shift(scratch.take<float>(s.channels)) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const double inverse = 1.0 / std::sqrt(static_cast<double>(t.var[c]) + t.eps);
      scale[c] = static_cast<float>(t.weight != nullptr ? t.weight[c] * inverse : inverse);
      shift[c] = t.bias != nullptr ? t.bias[c] : 0.0f;
    }
  }
  Scratch scratch;
  const float* mean;
  float *scale, *shift;
};

template <class T, bool RESIDUAL, bool RELU>
void apply_kernel(const BatchNormShape& s, const BatchNormTensors& t, T* out) {
  const ForwardTerms terms(s, t);
  const T* x = static_cast<const T*>(t.x);
  const T* residual = static_cast<const T*>(t.residual);
  for_activations(s, [&](auto layout, auto kind, int64_t i, int64_t c, int lanes) {
    const vec away = sub(get(kind, x + i, lanes), layout.term(kind, terms.mean, c, lanes));
    vec y = fma(away, layout.term(kind, terms.scale, c, lanes), layout.term(kind, terms.shift, c, lanes));
    if (RESIDUAL) y = add(y, get(kind, residual + i, lanes));
    if (RELU) y = max_keeping_nan(zero(), y);
    put(kind, out + i, y, lanes);
  });
}

// dx = scale (g - mean(g) - xhat mean(g xhat)) = scale g + slope (x - mean) + offset, with xhat = (x - mean) / deviation.
struct BackwardTerms {
  BackwardTerms(const BatchNormShape& s, const BatchNormTensors& t)
      : mean(t.mean),
        scale(scratch.take<float>(s.channels)),
        slope(scratch.take<float>(s.channels)),
        offset(scratch.take<float>(s.channels)) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const double inverse = 1.0 / std::sqrt(static_cast<double>(t.var[c]) + t.eps);
      const double gain = t.weight != nullptr ? t.weight[c] * inverse : inverse;
      scale[c] = static_cast<float>(gain);
      if (t.dweight == nullptr) continue;
      slope[c] = static_cast<float>(-gain * inverse * t.dweight[c] / t.count);
      offset[c] = static_cast<float>(-gain * t.dbias[c] / t.count);
    }
  }
  Scratch scratch;
  const float* mean;
  float *scale, *slope, *offset;
};

template <class T, bool RELU, bool MASKED, bool CONSTANT>
void backward_apply_kernel(const BatchNormShape& s, const BatchNormTensors& t, T* masked, T* dx) {
  const BackwardTerms terms(s, t);
  const Gradient<T, RELU> gradient{static_cast<const T*>(t.dy), static_cast<const T*>(t.y)};
  const T* x = static_cast<const T*>(t.x);
  for_activations(s, [&](auto layout, auto kind, int64_t i, int64_t c, int lanes) {
    const vec g = gradient(kind, i, lanes);
    if (MASKED) put(kind, masked + i, g, lanes);
    vec d = CONSTANT ? mul(g, layout.term(kind, terms.scale, c, lanes)) : zero();
    if (!CONSTANT) {
      const vec away = sub(get(kind, x + i, lanes), layout.term(kind, terms.mean, c, lanes));
      d = fma(away, layout.term(kind, terms.slope, c, lanes), layout.term(kind, terms.offset, c, lanes));
      d = fma(g, layout.term(kind, terms.scale, c, lanes), d);
    }
    put(kind, dx + i, d, lanes);
  });
}

// ---- entry points: run-time flags to template arguments -----------------------------------------------------------------

// Calls body with the flag as a type.
template <class Body>
void with_flag(bool flag, const Body& body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

// Calls body with a null pointer of the activations' type.
template <class Body>
void with_type(const BatchNormShape& s, const Body& body) {
  s.dtype == DType::bfloat16 ? body(static_cast<Bf16*>(nullptr)) : body(static_cast<float*>(nullptr));
}

inline void bn_statistics(const BatchNormShape& s, const BatchNormTensors& t, float* mean, float* var) {
  with_type(s, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* x = static_cast<const T*>(t.x);
    s.rows ? statistics_in_rows(s, x, mean, var) : statistics_in_planes(s, x, mean, var);
  });
}

inline void bn_apply(const BatchNormShape& s, const BatchNormTensors& t, void* out) {
  with_type(s, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    with_flag(t.residual != nullptr, [&](auto residual) {
      with_flag(t.relu, [&](auto relu) {
        apply_kernel<T, decltype(residual)::value, decltype(relu)::value>(s, t, static_cast<T*>(out));
      });
    });
  });
}

inline void bn_backward_reduce(const BatchNormShape& s, const BatchNormTensors& t, void* masked, float* dweight, float* dbias) {
  with_type(s, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* g = static_cast<T*>(masked);
    with_flag(t.y != nullptr, [&](auto relu) {
      with_flag(g != nullptr,
                [&](auto keep) { gradient_sums<T, decltype(relu)::value, decltype(keep)::value>(s, t, g, dweight, dbias); });
    });
  });
}

inline void bn_backward_apply(const BatchNormShape& s, const BatchNormTensors& t, void* masked, void* dx) {
  with_type(s, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* g = static_cast<T*>(masked);
    with_flag(t.y != nullptr, [&](auto relu) {
      with_flag(g != nullptr, [&](auto keep) {
        with_flag(t.dweight == nullptr, [&](auto constant) {
          constexpr bool RELU = decltype(relu)::value, MASKED = decltype(keep)::value, CONSTANT = decltype(constant)::value;
          backward_apply_kernel<T, RELU, MASKED, CONSTANT>(s, t, g, static_cast<T*>(dx));
        });
      });
    });
  });
}

}  // namespace resnet_fused::cpu::RF_ISA
