"""What kernels need to know of a GPU, and of where tensors lie."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def properties(device: torch.device) -> list[int]:
    """What plans depend on, in the order of csrc/cuda/plan.h's DeviceProperties: compute capability ×10 first."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.resnet_fused_cuda.device_properties(index)


def aligned(t: Tensor) -> Tensor:
    """t, or a copy if its first element is not at a multiple of 16 bytes (a view into another tensor)."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
