"""Batch norm's passes by the kernels of csrc/cuda, for channels_last activations on CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation
from resnet_fused.backends.problem import Activation, Kind, Problem
from resnet_fused.backends.reference.batch_norm import StockPasses


class BatchNorm(Implementation):
    """csrc/cuda/batch_norm.cuh."""

    name = "batch norm"
    kinds = frozenset({Kind.BATCH_NORM})

    def why_not(self, problem: Problem) -> str | None:
        served = problem.epilogue.activation in (Activation.NONE, Activation.RELU)
        return None if served else f"it has no passes for {problem.label}"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> _Passes:
        return _Passes()


class _Passes:
    """One pass over memory each. Activations in another memory format go through stock PyTorch ops."""

    def __init__(self) -> None:
        self._stock = StockPasses()

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not _readable(x):
            return self._stock.statistics(x)
        return torch.ops.resnet_fused_cuda.bn_statistics.default(x)

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
        if not _readable(x, residual):
            return self._stock.apply(x, residual, mean, var, weight, bias, eps, relu)
        function = "relu" if relu else "none"
        return torch.ops.resnet_fused_cuda.bn_apply_fwd.default(x, residual, mean, var, weight, bias, eps, function, 0.0)

    def backward_reduce(
        self, dy: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, eps: float, keep_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not _readable(dy, x, y):
            return self._stock.backward_reduce(dy, x, y, mean, var, eps, keep_masked)
        run = torch.ops.resnet_fused_cuda.bn_reduce_bwd.default
        dweight, dbias, masked = run(dy, x, y, mean, var, eps, keep_masked)
        return dweight, dbias, masked if keep_masked else None

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
        if not _readable(dy, x, y):
            return self._stock.backward_apply(dy, x, y, mean, var, weight, sums, eps, keep_masked)
        dweight, dbias, count = (None, None, 0.0) if sums is None else sums
        run = torch.ops.resnet_fused_cuda.bn_apply_bwd.default
        dx, masked = run(dy, x, y, mean, var, weight, dweight, dbias, count, eps, keep_masked)
        return dx, masked if keep_masked else None


def _readable(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels read these activations: channels_last, not empty, of one dtype, aligned to 16 bytes."""
    return first.numel() > 0 and all(
        t is None or (t.dtype == first.dtype and t.is_contiguous(memory_format=torch.channels_last) and t.data_ptr() % 16 == 0)
        for t in (first, *others)
    )
