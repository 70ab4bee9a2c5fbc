"""add_relu: y = relu(x + residual), one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import NO_PARAMETERS, STOCK, Activation, Epilogue, Kernel, Problem, choice, get, tuning_cache
from resnet_fused.backends.binding import bind
from resnet_fused.backends.problem import RESIDUAL, Pointwise, Step, Types, X
from resnet_fused.ops import common
from resnet_fused.runtime import calls

_ADD_RELU = Step(Pointwise.IDENTITY, Epilogue(residual=True, activation=Activation.RELU), (X, RESIDUAL))
_GRADIENT = Step(Pointwise.RELU_GRADIENT, Epilogue(), (X, RESIDUAL))


def _run(gradient: bool, a: Tensor, b: Tensor) -> Tensor:
    chosen = choice() if a.layout is b.layout is torch.strided else calls.choice_without_strides(choice())
    kernel = _kernel(gradient, a.shape, a.dtype, a.device, calls.memory_format(a, b), chosen, tuning_cache.generation())
    return kernel(a, b)


@functools.lru_cache(maxsize=256)
def _kernel(
    gradient: bool,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    format: torch.memory_format,
    chosen: str,
    generation: int,
) -> Kernel:
    """The bound kernel; `generation` (of the tuning cache) makes it bound again after rf.tune."""
    problem = Problem((_GRADIENT if gradient else _ADD_RELU,), shape, Types.of(dtype), device, format)
    if gradient and chosen != "auto" and get(chosen).why_not(problem) is not None:
        # Who chose a backend chose it for the op; that its derivative is stock's is no error.
        chosen = STOCK
    return bind(problem, NO_PARAMETERS, chosen).kernel


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    return _run(False, x, residual)


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (y,) = ctx.saved_tensors
    grad = _run(True, grad, y) if calls.plain_eager(grad, y) else common.relu_backward(grad, y)
    return grad, grad


common.register("add_relu(Tensor x, Tensor residual) -> Tensor", _eager, _fake)
common.register_autograd("add_relu", _setup_context, _backward)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual); see `resnet_fused.functional.add_relu`."""
    if calls.plain_eager(x, residual):
        return _eager(x, residual)
    if calls.stock_only():
        return common.stock_result((_ADD_RELU,), x, residual)
    return torch.ops.resnet_fused.add_relu.default(x, residual)
