// What differs between the PyTorch versions whose stable ABI this library is built on.
#pragma once

#include <torch/csrc/stable/ops.h>

// PyTorch 2.11's headers know it by its older name alone.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(CALL) TORCH_ERROR_CODE_CHECK(CALL)
#endif
