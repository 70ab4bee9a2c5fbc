"""The average over all pixels before the classifier of a fused model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import Kernel, choice, get
from resnet_fused.modules.settled import TakingOver

_ONE_PIXEL = (1, (1, 1), [1, 1])


class FusedGlobalAvgPool2d(TakingOver, nn.AdaptiveAvgPool2d):
    """y = mean of x over its pixels, (N, C, H, W) to (N, C, 1, 1), as nn.AdaptiveAvgPool2d(1).

    In inference on a CPU that our kernels serve, in float32 and bfloat16 and channels_last, its kernel shares the channels out
    over threads, which stock doesn't. In every other case it is nn.AdaptiveAvgPool2d.
    """

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in _ONE_PIXEL

    def kernel(self, x: Tensor, residual: Tensor | None = None) -> Kernel | None:
        # The size may have been changed since.
        return super().kernel(x) if self.output_size in _ONE_PIXEL else None

    def watched(self) -> list[dict[str, Any]]:
        return []

    def find_kernel(self, x: Tensor, residual: Tensor | None) -> Kernel | None:
        served = (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dim() == 4
            and x.numel() > 0
            and x.shape[2:].numel() > 1
            and x.is_contiguous(memory_format=torch.channels_last)
            and choice(self.backend) in ("auto", "cpu")
            and get("cpu").unavailable() is None
        )
        if not served:
            return None
        pool = torch.ops.resnet_fused_cpu.average_pool.default
        return lambda x, residual: pool(x)
