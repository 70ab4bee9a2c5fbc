"""add_relu: y = relu(x + residual), one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Folded, Kernel, Problem, choice, get, records
from resnet_fused.backends.binding import bind
from resnet_fused.ops import common
from resnet_fused.runtime import calls


def _run(op: str, a: Tensor, b: Tensor) -> Tensor:
    chosen = choice() if a.layout is b.layout is torch.strided else calls.choice_without_strides(choice())
    kernel = _kernel(op, a.shape, a.dtype, a.device, calls.memory_format(a, b), chosen, records.generation())
    return kernel(a, b)


@functools.lru_cache(maxsize=256)
def _kernel(
    op: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    format: torch.memory_format,
    chosen: str,
    generation: int,
) -> Kernel:
    """The bound kernel; `generation` (of the records) makes it bound anew after rf.tune."""
    problem = Problem(op, shape, dtype, device, memory_format=format)
    if op == "add_relu_backward" and chosen != "auto" and get(chosen).unsupported(problem) is not None:
        # Who chose a backend chose it for the op; that its derivative is stock's is no error.
        chosen = "reference"
    return bind(problem, _NOTHING, chosen).kernel


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    return _run("add_relu", x, residual)


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (y,) = ctx.saved_tensors
    grad = _run("add_relu_backward", grad, y) if calls.plain_eager(grad, y) else common.relu_backward(grad, y)
    return grad, grad


_NOTHING = Folded((), ())
common.register("add_relu(Tensor x, Tensor residual) -> Tensor", _eager, _fake)
common.register_autograd("add_relu", _setup_context, _backward)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual); see `resnet_fused.functional.add_relu`."""
    if calls.plain_eager(x, residual):
        return _eager(x, residual)
    if calls.stock_only():
        return common.stock("add_relu", (), x, residual)
    return torch.ops.resnet_fused.add_relu.default(x, residual)
