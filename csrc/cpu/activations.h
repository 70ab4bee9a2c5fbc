// Memory of results. A large block that PyTorch's CPU allocator frees goes back to the system, and the next layer pays for
// every page again: 9% of a ResNet-50's time. Freed blocks are therefore kept, in huge pages, and given out again, as many
// as recent calls needed.
#pragma once

#include <cstdint>
#include <memory>

#include <torch/csrc/stable/tensor.h>

namespace resnet_fused::cpu {

// An uninitialised channels_last tensor of shape (n, c, h, w) with the dtype of `like`.
torch::stable::Tensor new_activations(const torch::stable::Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);

// An uninitialised tensor of the shape, strides and dtype of `like`, which is dense and has four dimensions.
torch::stable::Tensor new_activations(const torch::stable::Tensor& like);

// An uninitialised contiguous float32 tensor of shape (o, k, k, i) on the device of `like`.
torch::stable::Tensor new_weight_gradient(const torch::stable::Tensor& like, int64_t o, int64_t k, int64_t i);

// Memory of activations that no tensor holds, from the same pool, to which it goes back.
struct ActivationBlock {
  void* memory;
  int64_t size;
};
struct GiveBack {
  void operator()(ActivationBlock* block) const;
};
using ActivationMemory = std::unique_ptr<ActivationBlock, GiveBack>;
ActivationMemory take_activation_memory(int64_t bytes);

// Gives the kept blocks back to the system; returns how many bytes that were.
int64_t release_activations();

// The bytes of kept blocks.
int64_t kept_activations();

}  // namespace resnet_fused::cpu
