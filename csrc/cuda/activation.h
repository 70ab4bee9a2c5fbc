// The function at the end of an epilogue, as torch.nn.functional names it. Plain C++.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../checks.h"

namespace resnet_fused {

enum class Activation : int32_t {
  none,
  relu,
  relu6,
  leaky_relu,
  sigmoid,
  silu,
  hardsigmoid,
  hardswish,
  gelu,
  gelu_tanh,  // GELU by its approximation with tanh
};

// The function of a name in Activation.
inline Activation activation_of(const std::string& name) {
  constexpr std::array NAMES = {"none", "relu",        "relu6",     "leaky_relu", "sigmoid",
                                "silu", "hardsigmoid", "hardswish", "gelu",       "gelu_tanh"};  // in order of Activation
  for (size_t i = 0; i < NAMES.size(); ++i)
    if (name == NAMES[i]) return Activation(i);
  RF_CHECK(false, "activation is '", name, "'; it must be one of Activation in csrc/cuda/activation.h.");
  return Activation::none;
}

}  // namespace resnet_fused
