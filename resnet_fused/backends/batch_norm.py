"""What a backend computes for batch norm: four passes, of which forward and backward are made.

Forward: `statistics`, `apply`. Backward: `backward_reduce`, `backward_apply`. Between the passes of a pair, processes exchange
their sums (SyncBatchNorm). Activations are dense, of shape (N, C, H, W), all in one memory format; statistics, parameters and
their gradients have shape (C,) and are float32, or float64 where the activations are.
"""

from __future__ import annotations

import functools
from typing import Protocol, cast

import torch
from torch import Tensor

from resnet_fused.backends import STOCK, choice, resolve
from resnet_fused.backends.parameters import NO_PARAMETERS
from resnet_fused.backends.problem import Activation, Epilogue, Pointwise, Problem, Shape


class BatchNormPasses(Protocol):
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


def passes(x: Tensor, residual: bool, relu: bool) -> BatchNormPasses:
    """The passes of the backend chosen for a batch norm of x with a residual, ReLU, or both after it."""
    return _passes(residual, relu, tuple(x.shape), x.dtype, x.device, choice())


def beats_stock(x: Tensor, residual: bool, relu: bool) -> bool:
    """Whether another backend than stock PyTorch is chosen for a batch norm of x, arguments as of `passes`."""
    if x.device.type == "cuda" and not x.is_contiguous(memory_format=torch.channels_last):
        return False  # the GPU's kernels take channels_last only, and stock's batch norm is one kernel
    return _beats_stock(residual, relu, x.dtype, x.device.type, x.device.index or 0, torch.compiler.is_compiling())


def _beats_stock(residual: bool, relu: bool, dtype: torch.dtype, device_type: str, device_index: int, compiling: bool) -> bool:
    if compiling and device_type == "cuda" and choice() == "auto":
        return False  # Inductor fuses stock's norms itself, and not with an operator of ours; neither was measured
    device = torch.device(device_type if device_type == "cpu" else f"{device_type}:{device_index}")
    return _is_served(residual, relu, dtype, device, choice())


# What torch.compiler.assume_constant_result does; calling it would import all of TorchDynamo, and Triton with it.
_beats_stock._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _is_served(residual: bool, relu: bool, dtype: torch.dtype, device: torch.device, chosen: str) -> bool:
    # The smallest shape stands for all: backends tell norms apart by dtype and device only.
    return resolve(_problem(residual, relu, (1, 1, 1, 1), dtype, device), chosen).name != STOCK


@functools.lru_cache(maxsize=512)
def _passes(residual: bool, relu: bool, shape: Shape, dtype: torch.dtype, device: torch.device, chosen: str) -> BatchNormPasses:
    problem = _problem(residual, relu, shape, dtype, device)
    return cast(BatchNormPasses, resolve(problem, chosen).prepare(problem, NO_PARAMETERS))


def _problem(residual: bool, relu: bool, shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    epilogue = Epilogue(residual, Activation.RELU if relu else Activation.NONE)
    return Problem.of(Pointwise.BATCH_NORM, shape, dtype, device, epilogue)
