"""conv2d: y = conv2d(x, weight) in training, where a backend's kernels compute y or a gradient faster.

Which of the three products they compute, y, the gradient of x and that of the weights, `TrainingConvKernels` says; the
others are stock PyTorch's. x may be bfloat16 with float32 weights, as under autocast; the gradient of the weights is then
float32, not rounded to bfloat16 on its way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends.training_conv import serves_at_any_size, training_conv
from resnet_fused.ops import common
from resnet_fused.runtime import calls


def beats_stock(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether this op serves the convolution, and is faster than stock PyTorch."""
    if x.dim() != 4 or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups or tuple(dilation) != (1, 1):
        return False
    square = stride[0] == stride[1] and padding[0] == padding[1] and weight.shape[2] == weight.shape[3]
    if not square or weight.dtype not in (torch.float32, x.dtype):
        return False
    if torch.compiler.is_compiling():
        # The graph serves inputs of other sizes too; when it runs, the op looks at what it is given.
        own = tuple(weight.shape)
        saves_most, serves = serves_at_any_size(x.device.type, x.dtype, x.shape[1], own, stride[0], padding[0])
    else:
        kernels = training_conv(x, tuple(weight.shape), stride[0], padding[0])
        saves_most, serves = kernels.saves_most, kernels.serves
    # In contiguous format only what saves most, Winograd, is worth the copies.
    return saves_most or (serves and calls.memory_format(x, weight) == torch.channels_last)


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    kernel = training_conv(x, tuple(weight.shape), stride, padding).forward
    if kernel is None:
        return _stock(x, weight, stride, padding)
    return kernel(x, weight).contiguous(memory_format=calls.memory_format(x, weight))


def _stock(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding, groups=_groups(x, weight))


def _fake(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    h, w = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:])
    return common.empty_result((x.shape[0], weight.shape[0], h, w), x, calls.memory_format(x, weight))


def _groups(x: Tensor, weight: Tensor) -> int:
    return x.shape[1] // weight.shape[1]


def _geometry(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
    return [stride, stride, padding, padding, 1, 1, _groups(x, weight)]


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients by x and weight; empty where `needs` says that one isn't needed."""
    kernels = training_conv(x, tuple(weight.shape), stride, padding)
    format = calls.memory_format(x, weight)
    dx = dweight = None
    if needs[0] and kernels.input_gradient is not None:
        dx = kernels.input_gradient(dy, weight, (x.shape[2], x.shape[3])).contiguous(memory_format=format)
    if needs[1] and kernels.weight_gradient is not None:
        full = kernels.weight_gradient(x, dy)
        # In the weight's own strides, which autograd would otherwise copy it to.
        if weight.dtype == full.dtype and weight.is_contiguous(memory_format=torch.channels_last):
            dweight = full.as_strided(weight.shape, weight.stride())
        else:
            dweight = torch.empty_like(weight).copy_(full)
    stock = [needs[0] and dx is None, needs[1] and dweight is None]
    if any(stock):
        more = _stock_gradients(dy, x, weight, stride, padding, stock)
        dx = more[0] if dx is None else dx
        dweight = more[1].to(weight.dtype) if dweight is None and more[1] is not None else dweight
    return dx if dx is not None else x.new_empty(0), dweight if dweight is not None else weight.new_empty(0)


def _stock_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x and weight, in x's dtype; None where not needed."""
    wanted = (*needs, False)
    return common.convolution_backward(dy, x, weight.to(x.dtype), _geometry(x, weight, stride, padding), wanted)[:2]


def _fake_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx = common.empty_result(x.shape, x, calls.memory_format(x, weight)) if needs[0] else x.new_empty(0)
    return dx, torch.empty_like(weight) if needs[1] else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2]]
    if torch.is_grad_enabled():
        # A second derivative is asked for: stock's formula has one.
        geometry = _geometry(x, weight, ctx.stride, ctx.padding)
        dx, dweight, _ = common.convolution_backward(dy, x, weight.to(x.dtype), geometry, (*needs, False))
        return dx, dweight.to(weight.dtype) if dweight is not None else None, None, None
    run = _gradients if calls.plain(dy, x, weight) else torch.ops.resnet_fused.conv2d_backward.default
    dx, dweight = run(dy, x, weight, ctx.stride, ctx.padding, needs)
    return dx if needs[0] else None, dweight if needs[1] else None, None, None


common.register("conv2d(Tensor x, Tensor weight, int stride, int padding) -> Tensor", _forward, _fake, _stock)
common.register(
    "conv2d_backward(Tensor dy, Tensor x, Tensor weight, int stride, int padding, bool[] needs) -> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _stock_gradients,
)
common.register_autograd("conv2d", _setup_context, _backward)
_Function = common.function("conv2d", _forward, _setup_context, _backward)


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    """F.conv2d(x, weight, stride=stride, padding=padding), in as many groups as fit, where `beats_stock` says so."""
    if not calls.plain(x, weight):
        return torch.ops.resnet_fused.conv2d.default(x, weight, stride, padding)
    if not calls.needs_grad(x, weight):
        return _forward(x, weight, stride, padding)
    return _Function.apply(x, weight, stride, padding)
