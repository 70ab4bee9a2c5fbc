// What the files of operators share: checks of their arguments, and the run of a convolution.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "kernels.h"

namespace resnet_fused::cpu {

// float32, bfloat16 or float16, as a DType, and back.
inline DType dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::BFloat16 ? DType::bfloat16 : type == ScalarType::Half ? DType::float16 : DType::float32;
}
inline DType dtype_of(const torch::stable::Tensor& t) { return dtype_of(t.scalar_type()); }
inline torch::headeronly::ScalarType scalar_type_of(DType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == DType::bfloat16 ? ScalarType::BFloat16 : dtype == DType::float16 ? ScalarType::Half : ScalarType::Float;
}

// That kernels for activations of this dtype are at hand.
void check_dtype(torch::headeronly::ScalarType dtype, const char* name);

// Channels up to whole panels.
int64_t padded_channels(int64_t channels);

// Whether a tensor of four dimensions has these strides, and whether it is dense in channels_last.
bool has_strides(const torch::stable::Tensor& t, const std::array<int64_t, 4>& strides);
bool is_channels_last(const torch::stable::Tensor& t);

// That `t` is float32, bfloat16 or float16, with four dimensions, and dense in channels_last.
void check_cpu_activations(const torch::stable::Tensor& t, const char* name);

// Height or width of a convolution's result; `kernel` with its dilation.
int64_t result_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad);

// Sets kernel, stride, padding and dilation, (height, width) each, and the size of the result.
void set_geometry(ConvParams& p, const std::vector<int64_t>& geometry);

// The function of a name in ActivationFunction.
Nonlinearity nonlinearity(const std::string& activation, double slope);

// What is packed of `weight`, which is dense in channels_last; all but where to, and how.
PackParams pack_params(const torch::stable::Tensor& weight);

// That run_conv can run a convolution, of which all is set but x, residual and y.
void check_conv(const ConvParams& p, const std::vector<int64_t>& plan);

// Runs a convolution by the five numbers of a WinogradPlan, or where `plan` is empty, directly.
void run_conv(const ConvParams& p, const std::vector<int64_t>& plan);

// y = f(conv(x, w) + bias), and a max-pool after a ReLU; conv 7 x 7 / 2 with padding 3, pool 3 x 3 / 2 with padding 1.
// `weights` are transformed, [panel][36][4 in_channels][PANEL]; x may have any strides. None where the kernel declined x.
std::optional<torch::stable::Tensor> stem(const torch::stable::Tensor& x, const torch::stable::Tensor& weights,
                                          const torch::stable::Tensor& bias, int64_t out_channels, bool pool,
                                          const std::string& activation, double slope);

}  // namespace resnet_fused::cpu
