"""What a backend computes for batch norm: four passes, of which the ops bn, bn_relu and bn_add_relu are made.

Forward: `statistics`, `apply`. Backward: `backward_reduce`, `backward_apply`. Between the passes of a pair, processes exchange
their sums (SyncBatchNorm). Activations are dense, of shape (N, C, H, W), all in one memory format; statistics, parameters and
their gradients have shape (C,) and are float32, or float64 where the activations are.
"""

from __future__ import annotations

import functools
from typing import Protocol, cast

import torch
from torch import Tensor

from resnet_fused.backends import Backend, choice, resolve
from resnet_fused.backends.problem import Problem

NORM_OPS = ("bn", "bn_relu", "bn_add_relu")


class NormKernels(Protocol):
    """The four passes over the activations. None stands for a tensor that the op doesn't have."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel of x, which isn't empty."""

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
    ) -> Tensor:
        """act((x − mean) · weight / sqrt(var + eps) + bias + residual)."""

    def backward_reduce(
        self, dy: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, eps: float, keep_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dweight = Σ g·(x − mean) / sqrt(var + eps), dbias = Σ g, and g if `keep_masked`; g = dy through y's ReLU mask."""

    def backward_apply(
        self,
        dy: Tensor,
        x: Tensor | None,
        y: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        sums: tuple[Tensor, Tensor, float] | None,
        eps: float,
        keep_masked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """dx, and g if `keep_masked`. `sums`: dweight, dbias and the values of a channel; None if statistics are constants."""


class NormBackend(Backend, Protocol):
    """A backend that serves norms: `unsupported` is None for one of NORM_OPS on some input."""

    def norm(self) -> NormKernels:
        """The passes."""


def norm_kernels(op: str, x: Tensor) -> NormKernels:
    """The passes of the backend chosen for `op` on an input like x."""
    return _kernels(op, tuple(x.shape), x.dtype, x.device, choice())


def served(op: str, x: Tensor) -> bool:
    """Whether another backend than the reference, which is stock PyTorch, is chosen for `op` on an input like x."""
    if x.device.type == "cuda" and not x.is_contiguous(memory_format=torch.channels_last):
        return False  # the GPU's kernels take channels_last only, and stock's batch norm is one kernel
    return _served(op, x.dtype, x.device.type, x.device.index or 0, torch.compiler.is_compiling())


def _served(op: str, dtype: torch.dtype, device_type: str, device_index: int, compiling: bool) -> bool:
    if compiling and device_type == "cuda" and choice() == "auto":
        return False  # Inductor fuses stock's norms itself, and not with an operator of ours; neither was measured
    # The smallest shape stands for all: backends tell norms apart by dtype and device only.
    problem = Problem(
        op, (1, 1, 1, 1), dtype, torch.device(device_type if device_type == "cpu" else f"{device_type}:{device_index}")
    )
    return resolve(problem, choice()).name != "reference"


# What torch.compiler.assume_constant_result does; calling it would import all of TorchDynamo, and Triton with it.
_served._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=512)
def _kernels(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, chosen: str) -> NormKernels:
    problem = Problem(op, shape, dtype, device)
    return cast(NormBackend, resolve(problem, chosen)).norm()
