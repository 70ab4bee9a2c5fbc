"""Batch norm's passes in stock PyTorch ops: the truth for other backends' passes, and what serves every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation
from resnet_fused.backends.problem import Kind, Problem


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _channels(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def _masked(dy: Tensor, y: Tensor | None) -> Tensor:
    return dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)


class StockPasses:
    """Stock PyTorch ops, one after the other, in float32 (float64 for float64)."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # In two passes: one in float32 loses digits of a variance that is small beside the mean, on a GPU more than on a CPU.
        mean = _wide(x).mean((0, 2, 3))
        centred = _wide(x) - _channels(mean)
        rest = centred.mean((0, 2, 3))
        return mean + rest, centred.square_().mean((0, 2, 3)) - rest * rest

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
        scale = (var + eps).rsqrt()
        y = (_wide(x) - _channels(mean)) * _channels(scale if weight is None else scale * weight)
        if bias is not None:
            y += _channels(bias)
        if residual is not None:
            y += residual
        return (y.relu_() if relu else y).to(x.dtype)

    def backward_reduce(
        self, dy: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, eps: float, keep_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        masked = _masked(dy, y)
        g = _wide(masked)
        xhat = (_wide(x) - _channels(mean)) * _channels((var + eps).rsqrt())
        return (g * xhat).sum((0, 2, 3)), g.sum((0, 2, 3)), masked if keep_masked else None

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
        masked = _masked(dy, y)
        g = _wide(masked)
        inverse = (var + eps).rsqrt()
        if sums is not None:
            assert x is not None
            dweight, dbias, count = sums
            xhat = (_wide(x) - _channels(mean)) * _channels(inverse)
            g = g - _channels(dbias / count) - xhat * _channels(dweight / count)
        dx = (g * _channels(inverse if weight is None else inverse * weight)).to(dy.dtype)
        return dx, masked if keep_masked else None


class BatchNorm(Implementation):
    """The passes as PyTorch's ops."""

    name = "stock batch norm"
    kinds = frozenset({Kind.BATCH_NORM})

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> StockPasses:
        return StockPasses()
