// The operators of batch norm and add_relu, on PyTorch's stable ABI. Tensors are checked here; formulas are in
// batch_norm.cuh.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../checks.h"
#include "launch.h"
#include "batch_norm_plan.h"
#include "tensors.h"

namespace resnet_fused {
namespace {

using Optional = std::optional<Tensor>;

// A tensor by channel: contiguous float32 on x's device.
const float* by_channel(const char* name, const Tensor& t, const Tensor& x) {
  RF_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == x.size(1) &&
               t.get_device_index() == x.get_device_index(),
           name, " must be ", x.size(1), " contiguous float32 on x's device");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* by_channel(const char* name, const Optional& t, const Tensor& x) {
  return t.has_value() ? by_channel(name, *t, x) : nullptr;
}

// Another activation, which must be laid out as x is.
const void* beside(const char* name, const Tensor& t, const Tensor& x) {
  RF_CHECK(t.dim() == 4 && t.scalar_type() == x.scalar_type() && t.numel() == x.numel() && is_channels_last(t) &&
               is_aligned(t) && t.get_device_index() == x.get_device_index(),
           name, " must have the shape, dtype and device of the first tensor, channels_last and aligned to 16 bytes");
  return t.const_data_ptr();
}

const void* beside(const char* name, const Optional& t, const Tensor& x) {
  return t.has_value() ? beside(name, *t, x) : nullptr;
}

BatchNormPlan plan_of(BatchNormPass pass, const Tensor& x) {
  RF_CHECK(x.dim() == 4 && is_channels_last(x) && is_aligned(x) && x.numel() > 0,
           "the activations must be (N, C, H, W), not empty, channels_last and aligned to 16 bytes");
  const int64_t rows = x.numel() / x.size(1);
  return plan_batch_norm(pass, rows, x.size(1), element_type(x, false), device_properties(x.get_device_index()));
}

void run(BatchNormPlan& plan, const Tensor& x) {
  const int32_t device = x.get_device_index();
  Optional workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_floats(plan.workspace_bytes / int64_t(sizeof(float)), x);
    plan.params.partial = static_cast<float*>(workspace->mutable_data_ptr());
  }
  for (const KernelLaunch& l : plan.launches) launch(l, &plan.params, device);
}

std::tuple<Tensor, Tensor> bn_statistics_op(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BatchNormPlan plan = plan_of(BatchNormPass::statistics, x);
  Tensor mean = empty_floats(x.size(1), x), var = empty_floats(x.size(1), x);
  auto& p = plan.params;
  p.x = x.const_data_ptr();
  p.first = static_cast<float*>(mean.mutable_data_ptr()), p.second = static_cast<float*>(var.mutable_data_ptr());
  run(plan, x);
  return {mean, var};
}

Tensor bn_apply_fwd_op(const Tensor& x, Optional residual, const Tensor& mean, const Tensor& var, Optional weight,
                       Optional bias, double eps, std::string activation, double slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Activation function = activation_of(activation);
  BatchNormPlan plan = plan_of(apply_pass(function), x);
  Tensor y = torch::stable::empty_like(x);
  auto& p = plan.params;
  p.x = x.const_data_ptr(), p.residual = beside("residual", residual, x), p.out = y.mutable_data_ptr();
  p.mean = by_channel("mean", mean, x), p.var = by_channel("var", var, x);
  p.weight = by_channel("weight", weight, x), p.bias = by_channel("bias", bias, x);
  p.eps = float(eps), p.activation = function, p.slope = float(slope);
  run(plan, x);
  return y;
}

// masked is empty unless keep_masked.
std::tuple<Tensor, Tensor, Tensor> bn_reduce_bwd_op(const Tensor& dy, const Tensor& x, Optional y, const Tensor& mean,
                                                    const Tensor& var, double eps, bool keep_masked) {
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  BatchNormPlan plan = plan_of(BatchNormPass::reduce_bwd, dy);
  Tensor dweight = empty_floats(dy.size(1), dy), dbias = empty_floats(dy.size(1), dy);
  Tensor masked = keep_masked ? torch::stable::empty_like(dy) : empty_floats(0, dy);
  auto& p = plan.params;
  p.dy = dy.const_data_ptr(), p.x = beside("x", x, dy), p.y = beside("y", y, dy);
  p.masked = keep_masked ? masked.mutable_data_ptr() : nullptr;
  p.mean = by_channel("mean", mean, dy), p.var = by_channel("var", var, dy), p.eps = float(eps);
  p.first = static_cast<float*>(dweight.mutable_data_ptr()), p.second = static_cast<float*>(dbias.mutable_data_ptr());
  run(plan, dy);
  return {dweight, dbias, masked};
}

// dweight, dbias and count: of the batch; none where statistics are constants. masked is empty unless keep_masked.
std::tuple<Tensor, Tensor> bn_apply_bwd_op(const Tensor& dy, Optional x, Optional y, const Tensor& mean, const Tensor& var,
                                           Optional weight, Optional dweight, Optional dbias, double count, double eps,
                                           bool keep_masked) {
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  RF_CHECK(dweight.has_value() == dbias.has_value() && (!dweight.has_value() || (x.has_value() && count > 0)),
           "dweight and dbias come together, with x and the number of values of a channel");
  BatchNormPlan plan = plan_of(BatchNormPass::apply_bwd, dy);
  Tensor dx = torch::stable::empty_like(dy);
  Tensor masked = keep_masked ? torch::stable::empty_like(dy) : empty_floats(0, dy);
  auto& p = plan.params;
  p.dy = dy.const_data_ptr(), p.y = beside("y", y, dy), p.out = dx.mutable_data_ptr();
  p.x = dweight.has_value() ? beside("x", x, dy) : nullptr;
  p.masked = keep_masked ? masked.mutable_data_ptr() : nullptr;
  p.mean = by_channel("mean", mean, dy), p.var = by_channel("var", var, dy), p.weight = by_channel("weight", weight, dy);
  p.dweight = by_channel("dweight", dweight, dy), p.dbias = by_channel("dbias", dbias, dy);
  p.eps = float(eps), p.inverse_count = dweight.has_value() ? float(1.0 / count) : 0.0f;
  run(plan, dy);
  return {dx, masked};
}

// Both tensors are dense and have the same strides.
Tensor add_relu(bool backward, const Tensor& a, const Tensor& b) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  RF_CHECK(a.scalar_type() == b.scalar_type() && a.numel() == b.numel() && is_aligned(a) && is_aligned(b) &&
               a.get_device_index() == b.get_device_index(),
           "both tensors must be of one shape, dtype, device and memory format, aligned to 16 bytes");
  Tensor out = torch::stable::empty_like(a);
  if (a.numel() == 0) return out;
  const int32_t device = a.get_device_index();
  AddReluParams p{a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr(), a.numel()};
  launch(plan_add_relu(backward, p.count, element_type(a, false), device_properties(device)), &p, device);
  return out;
}

Tensor add_relu_fwd_op(const Tensor& x, const Tensor& residual) { return add_relu(false, x, residual); }

Tensor add_relu_bwd_op(const Tensor& dy, const Tensor& y) { return add_relu(true, dy, y); }

PlanWords batch_norm_plan_op(int64_t pass, int64_t rows, int64_t channels, int64_t type, Ints device, Ints pointers, double eps,
                             double inverse_count, std::string activation, double slope) {
  RF_CHECK(pass >= 0 && pass <= 3 && pointers.size() == 15, "pass is 0 to 3, and pointers are 15 in order of BatchNormParams");
  const Activation function = activation_of(activation);
  const BatchNormPass chosen = BatchNormPass(pass) == BatchNormPass::apply_fwd ? apply_pass(function) : BatchNormPass(pass);
  BatchNormPlan plan = plan_batch_norm(chosen, rows, channels, ElementType(type), device_of(device));
  auto& p = plan.params;
  size_t next = 0;
  for (const void** to : {&p.x, &p.residual, &p.dy, &p.y}) *to = reinterpret_cast<const void*>(pointers[next++]);
  for (void** to : {&p.out, &p.masked}) *to = reinterpret_cast<void*>(pointers[next++]);
  for (const float** to : {&p.mean, &p.var, &p.weight, &p.bias, &p.dweight, &p.dbias})
    *to = reinterpret_cast<const float*>(pointers[next++]);
  for (float** to : {&p.partial, &p.first, &p.second}) *to = reinterpret_cast<float*>(pointers[next++]);
  p.eps = float(eps), p.inverse_count = float(inverse_count), p.activation = function, p.slope = float(slope);
  return plan_words(plan.launches, p, plan.workspace_bytes);
}

PlanWords add_relu_plan_op(bool backward, int64_t count, int64_t type, Ints device, Ints pointers) {
  RF_CHECK(pointers.size() == 3, "pointers are 3, in order of AddReluParams");
  const AddReluParams p{reinterpret_cast<const void*>(pointers[0]), reinterpret_cast<const void*>(pointers[1]),
                        reinterpret_cast<void*>(pointers[2]), count};
  return plan_words({plan_add_relu(backward, count, ElementType(type), device_of(device))}, p, 0);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("bn_statistics(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "bn_apply_fwd(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str "
      "activation, float slope) -> Tensor");
  m.def(
      "bn_reduce_bwd(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor var, float eps, bool keep_masked) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "bn_apply_bwd(Tensor dy, Tensor? x, Tensor? y, Tensor mean, Tensor var, Tensor? weight, Tensor? dweight, Tensor? "
      "dbias, "
      "float count, float eps, bool keep_masked) -> (Tensor, Tensor)");
  m.def("add_relu_fwd(Tensor x, Tensor residual) -> Tensor");
  m.def("add_relu_bwd(Tensor dy, Tensor y) -> Tensor");
  m.def(
      "batch_norm_plan(int batch_norm_pass, int rows, int channels, int type, int[] device, int[] pointers, float eps, float "
      "inverse_count, str activation, float slope) -> (str[], int[], int[], int)");
  m.def("add_relu_plan(bool backward, int count, int type, int[] device, int[] pointers) -> (str[], int[], int[], int)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("bn_statistics", TORCH_BOX(&resnet_fused::bn_statistics_op));
  m.impl("bn_apply_fwd", TORCH_BOX(&resnet_fused::bn_apply_fwd_op));
  m.impl("bn_reduce_bwd", TORCH_BOX(&resnet_fused::bn_reduce_bwd_op));
  m.impl("bn_apply_bwd", TORCH_BOX(&resnet_fused::bn_apply_bwd_op));
  m.impl("add_relu_fwd", TORCH_BOX(&resnet_fused::add_relu_fwd_op));
  m.impl("add_relu_bwd", TORCH_BOX(&resnet_fused::add_relu_bwd_op));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_plan", TORCH_BOX(&resnet_fused::batch_norm_plan_op));
  m.impl("add_relu_plan", TORCH_BOX(&resnet_fused::add_relu_plan_op));
}
