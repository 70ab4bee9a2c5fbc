"""add_relu: y = relu(x + residual), one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Folded, Problem, choice
from resnet_fused.backends.binding import bind
from resnet_fused.ops import common


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    n, c, h, w = x.shape
    problem = Problem("add_relu", (n, c, h, w), x.dtype, x.device, memory_format=common.memory_format(x, residual))
    return bind(problem, _NOTHING, choice()).kernel(x, residual)


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (y,) = ctx.saved_tensors
    grad = common.relu_backward(grad, y)
    return grad, grad


_NOTHING = Folded((), ())
common.register("add_relu(Tensor x, Tensor residual) -> Tensor", _eager, _fake)
common.register_autograd("add_relu", _setup_context, _backward)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual); see `resnet_fused.functional.add_relu`."""
    if common.plain_eager(x, residual):
        return _eager(x, residual)
    return torch.ops.resnet_fused.add_relu.default(x, residual)
