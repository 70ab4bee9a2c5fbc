"""The classifier at the end of a fused model, as a 1×1 convolution on one pixel an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import Conv, Kernel, choice, get
from resnet_fused.modules.settled import TakingOver
from resnet_fused.ops.common import Runner, plain

# Stock reads the weights of few rows on one thread. Ours took 0.33 to 0.91 of its time up to here (512 and 2048 features, 1000
# classes, two cores of a Zen 5); with 256 rows the two are level in bfloat16.
_MOST_ROWS = 128
# The packed copy of a larger layer (VGG's have 100 million weights) takes more memory than its speed is worth.
_MOST_WEIGHTS = 1 << 22


def _has_plain_parameters(module: nn.Linear) -> bool:
    """Whether weight and bias are the module's own parameters, and not computed from others."""
    return module._parameters.keys() == {"weight", "bias"} and module.bias is not None


class FusedLinear(TakingOver, nn.Linear):
    """y = x Wᵀ + b, as nn.Linear and with its parameters; x of shape (N, in_features), or any that nn.Linear takes.

    In inference of up to 128 rows on a CPU that our kernels serve, in float32 and bfloat16, it runs as conv2d_bn on images of
    one pixel. In every other case it is nn.Linear.
    """

    _runner: Runner | None = None

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        return type(module) is nn.Linear and _has_plain_parameters(module) and 0 < module.weight.numel() <= _MOST_WEIGHTS

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runner": None}

    def watched(self) -> list[dict[str, Any]]:
        return [self._parameters]

    def _serves(self, x: Tensor) -> bool:
        # They may have been pruned, parametrized or replaced since.
        if not _has_plain_parameters(self):
            return False
        weight, bias = self.weight, self.bias
        return (
            plain(weight, bias)
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dtype == weight.dtype == bias.dtype
            and x.dim() == 2
            and 0 < x.shape[0] <= _MOST_ROWS
            and x.shape[1] == weight.shape[1]
            and choice(self.backend) in ("auto", "cpu")
            and get("cpu").unavailable() is None
        )

    def find_kernel(self, x: Tensor, residual: Tensor | None) -> Kernel | None:
        if not self._serves(x):
            return None
        filters = self.weight[:, :, None, None]
        convs = (Conv.of(filters, (1, 1), (0, 0), (1, 1), 1),)
        runner = self._runner
        if runner is None or runner.convs != convs:
            runner = self._runner = Runner("conv2d_bn", convs, backend=self.backend)
        on_pixels = runner.kernel(x[:, :, None, None], None, [filters], [self.bias])
        return lambda x, residual: on_pixels(x[:, :, None, None], None).flatten(1)

    def packed_bytes(self) -> int:
        """Bytes of what backends packed from the parameters, beside the parameters themselves."""
        return self._runner.packed_bytes() if self._runner is not None else 0
