// Launches kernels by name on PyTorch's current stream.
#pragma once

#include <string>

#include "plan.h"

namespace resnet_fused {

// Properties of a CUDA device, read once.
const DeviceProperties& device_properties(int32_t device);

// Launches on the current stream of the current device `device`. Throws std::runtime_error with CUDA's reason.
void launch(const KernelLaunch& launch, void* params, int32_t device);

}  // namespace resnet_fused
