"""Batch norm's passes by the compiled kernels of csrc/cpu/bn*."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation
from resnet_fused.backends.batch_norm import BatchNormPasses
from resnet_fused.backends.problem import Kind, Problem


class BatchNorm(Implementation):
    """Its four passes, vectorised, on as many threads as PyTorch has."""

    name = "batch norm"
    kinds = frozenset({Kind.BATCH_NORM})

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> BatchNormPasses:
        return _Passes()


class _Passes:
    """The kernels write into tensors that are made here."""

    def __init__(self) -> None:
        library = torch.ops.resnet_fused_cpu
        # From the library's pool of kept memory: PyTorch would give large results back to the system, and ask for them page by
        # page again.
        self._empty = library.empty_activations.default
        self._statistics = library.bn_statistics.default
        self._apply = library.bn_apply.default
        self._backward_reduce = library.bn_backward_reduce.default
        self._backward_apply = library.bn_backward_apply.default

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_empty(x.shape[1], dtype=torch.float32)
        var = torch.empty_like(mean)
        self._statistics(x, mean, var)
        return mean, var

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
        y = self._empty(x)
        self._apply(x, residual, mean, var, weight, bias, eps, relu, y)
        return y

    def backward_reduce(
        self, dy: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, eps: float, keep_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        masked = self._empty(x) if keep_masked else None
        dweight = torch.empty_like(mean)
        dbias = torch.empty_like(mean)
        self._backward_reduce(dy, x, y, mean, var, eps, masked, dweight, dbias)
        return dweight, dbias, masked

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
        masked = self._empty(dy) if keep_masked else None
        dx = self._empty(dy)
        dweight, dbias, count = sums if sums is not None else (None, None, 1.0)
        self._backward_apply(dy, x, y, mean, var, weight, dweight, dbias, count, eps, masked, dx)
        return dx, masked
