// The batch-norm and add_relu kernels, listed once: batch_norm.cu compiles them, launch.cpp finds them by name.
#pragma once

// X(name, function, element, vector) for kernels of both widths: 16 bytes, and one element for odd channel counts.
#define RF_NORM_KERNELS_OF(X, SUFFIX, ELEMENT)                                        \
  X(bn_statistics_##SUFFIX, bn_statistics, ELEMENT, true)                             \
  X(bn_statistics_##SUFFIX##_scalar, bn_statistics, ELEMENT, false)                   \
  X(bn_apply_fwd_##SUFFIX, bn_apply_fwd, ELEMENT, true)                               \
  X(bn_apply_fwd_##SUFFIX##_scalar, bn_apply_fwd, ELEMENT, false)                     \
  X(bn_apply_activated_fwd_##SUFFIX, bn_apply_activated_fwd, ELEMENT, true)           \
  X(bn_apply_activated_fwd_##SUFFIX##_scalar, bn_apply_activated_fwd, ELEMENT, false) \
  X(bn_reduce_bwd_##SUFFIX, bn_reduce_bwd, ELEMENT, true)                             \
  X(bn_reduce_bwd_##SUFFIX##_scalar, bn_reduce_bwd, ELEMENT, false)                   \
  X(bn_apply_bwd_##SUFFIX, bn_apply_bwd, ELEMENT, true)                               \
  X(bn_apply_bwd_##SUFFIX##_scalar, bn_apply_bwd, ELEMENT, false)

#define RF_NORM_KERNELS(X)              \
  RF_NORM_KERNELS_OF(X, f16, float16)   \
  RF_NORM_KERNELS_OF(X, bf16, bfloat16) \
  RF_NORM_KERNELS_OF(X, f32, float32)

// X(name, function): take BatchNormParams, whatever the element.
#define RF_NORM_FINISH_KERNELS(X)               \
  X(bn_statistics_finish, bn_statistics_finish) \
  X(bn_reduce_bwd_finish, bn_reduce_bwd_finish)

// X(name, function, element): take AddReluParams.
#define RF_ADD_RELU_KERNELS(X)                 \
  X(add_relu_fwd_f16, add_relu_fwd, float16)   \
  X(add_relu_fwd_bf16, add_relu_fwd, bfloat16) \
  X(add_relu_fwd_f32, add_relu_fwd, float32)   \
  X(add_relu_bwd_f16, add_relu_bwd, float16)   \
  X(add_relu_bwd_bf16, add_relu_bwd, bfloat16) \
  X(add_relu_bwd_f32, add_relu_bwd, float32)
