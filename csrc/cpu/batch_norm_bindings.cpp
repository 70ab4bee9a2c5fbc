// Batch norm operators of the namespace resnet_fused_cpu, on PyTorch's stable ABI. They write into tensors that the caller,
// resnet_fused/backends/cpu/batch_norm.py, made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../checks.h"
#include "bindings.h"
#include "batch_norm_params.h"
#include "isa.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const BatchNormKernels& bn_kernels() { return kernels().batch_norm; }

bool dense_planes(const Tensor& t) {
  return has_strides(t, {t.size(1) * t.size(2) * t.size(3), t.size(2) * t.size(3), t.size(3), 1});
}

BatchNormShape shape_of(const Tensor& x, const char* name) {
  RF_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a CPU tensor with four dimensions, (N, C, H, W).");
  RF_CHECK(x.numel() > 0, name, " is empty; use the backend 'reference'.");
  const ScalarType dtype = x.scalar_type();
  RF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
           " must be float32 or bfloat16; convert it with .to().");
  const bool rows = is_channels_last(x);
  RF_CHECK(rows || dense_planes(x), name, " is neither channels_last nor contiguous; call .contiguous() on it.");
  return {x.size(0), x.size(1), x.size(2) * x.size(3), rows, dtype_of(x)};
}

// Data of an activation that must be like the one that `s` was taken from.
void* like(const BatchNormShape& s, const Tensor& t, const char* name) {
  RF_CHECK(t.is_cpu() && t.dim() == 4 && t.size(0) == s.images && t.size(1) == s.channels && t.size(2) * t.size(3) == s.pixels,
           name, " must be a CPU tensor of the same shape as the first activation.");
  RF_CHECK(t.scalar_type() == (s.dtype == DType::bfloat16 ? ScalarType::BFloat16 : ScalarType::Float), name,
           " must have the dtype of the first activation.");
  RF_CHECK(s.rows ? is_channels_last(t) : dense_planes(t), name, " must have the memory format of the first activation.");
  return t.mutable_data_ptr();
}

void* like(const BatchNormShape& s, const MaybeTensor& t, const char* name) {
  return t.has_value() ? like(s, *t, name) : nullptr;
}

float* per_channel(const BatchNormShape& s, const Tensor& t, const char* name) {
  RF_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() == s.channels && t.is_contiguous(), name,
           " must be a contiguous float32 CPU tensor with one value for each of the ", s.channels, " channels.");
  return static_cast<float*>(t.mutable_data_ptr());
}

float* per_channel(const BatchNormShape& s, const MaybeTensor& t, const char* name) {
  return t.has_value() ? per_channel(s, *t, name) : nullptr;
}

void bn_statistics(Tensor x, Tensor mean, Tensor var) {
  const BatchNormShape s = shape_of(x, "x");
  BatchNormTensors t;
  t.x = x.const_data_ptr();
  bn_kernels().statistics(s, t, per_channel(s, mean, "mean"), per_channel(s, var, "var"));
}

void bn_apply(Tensor x, MaybeTensor residual, Tensor mean, Tensor var, MaybeTensor weight, MaybeTensor bias, double eps,
              bool relu, Tensor y) {
  const BatchNormShape s = shape_of(x, "x");
  BatchNormTensors t;
  t.x = x.const_data_ptr();
  t.residual = like(s, residual, "residual");
  t.mean = per_channel(s, mean, "mean");
  t.var = per_channel(s, var, "var");
  t.weight = per_channel(s, weight, "weight");
  t.bias = per_channel(s, bias, "bias");
  t.eps = eps;
  t.relu = relu;
  bn_kernels().apply(s, t, like(s, y, "y"));
}

void bn_backward_reduce(Tensor dy, Tensor x, MaybeTensor y, Tensor mean, Tensor var, double eps, MaybeTensor masked,
                        Tensor dweight, Tensor dbias) {
  const BatchNormShape s = shape_of(dy, "dy");
  BatchNormTensors t;
  t.dy = dy.const_data_ptr();
  t.x = like(s, x, "x");
  t.y = like(s, y, "y");
  t.mean = per_channel(s, mean, "mean");
  t.var = per_channel(s, var, "var");
  t.eps = eps;
  bn_kernels().backward_reduce(s, t, like(s, masked, "masked"), per_channel(s, dweight, "dweight"),
                               per_channel(s, dbias, "dbias"));
}

void bn_backward_apply(Tensor dy, MaybeTensor x, MaybeTensor y, Tensor mean, Tensor var, MaybeTensor weight,
                       MaybeTensor dweight, MaybeTensor dbias, double count, double eps, MaybeTensor masked, Tensor dx) {
  const BatchNormShape s = shape_of(dy, "dy");
  RF_CHECK(dweight.has_value() == dbias.has_value() && (x.has_value() || !dweight.has_value()),
           "dweight, dbias and x are given together, or none of the first two is.");
  BatchNormTensors t;
  t.dy = dy.const_data_ptr();
  t.x = like(s, x, "x");
  t.y = like(s, y, "y");
  t.mean = per_channel(s, mean, "mean");
  t.var = per_channel(s, var, "var");
  t.weight = per_channel(s, weight, "weight");
  t.dweight = per_channel(s, dweight, "dweight");
  t.dbias = per_channel(s, dbias, "dbias");
  t.count = count;
  t.eps = eps;
  bn_kernels().backward_apply(s, t, like(s, masked, "masked"), like(s, dx, "dx"));
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "bn_apply(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu, "
      "Tensor(a!) y) -> ()");
  m.def(
      "bn_backward_reduce(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor var, float eps, Tensor(a!)? masked, "
      "Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
  m.def(
      "bn_backward_apply(Tensor dy, Tensor? x, Tensor? y, Tensor mean, Tensor var, Tensor? weight, Tensor? dweight, "
      "Tensor? dbias, float count, float eps, Tensor(a!)? masked, Tensor(b!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("bn_statistics", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply", TORCH_BOX(&bn_apply));
  m.impl("bn_backward_reduce", TORCH_BOX(&bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&bn_backward_apply));
}
