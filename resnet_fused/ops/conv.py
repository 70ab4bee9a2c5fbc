"""The common part of conv2d_bn, conv2d_bn_relu and conv2d_bn_add_relu, which differ in what follows the convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Conv
from resnet_fused.ops import common
from resnet_fused.runtime import calls


def define(name: str, *, residual: bool, relu: bool) -> Callable[..., Tensor]:
    """Registers resnet_fused::`name` and gives the function that calls it: the kernel directly where that is possible.

    The function's arguments are x, weight, shift, residual (only with `residual`), stride, padding, dilation, groups.
    """
    tensors = ("x", "weight", "shift", *(("residual",) if residual else ()))
    schema = (
        f"{name}({', '.join(f'Tensor {t}' for t in tensors)}, int[2] stride, int[2] padding, int[2] dilation, int groups)"
        " -> Tensor"
    )
    count = len(tensors)

    def eager(*args: Any) -> Tensor:
        x, weight, shift, *rest = args[:count]
        runner = common.runner_for(weight, name, (Conv.of(weight, *args[count:]),))
        return runner(x, rest[0] if rest else None, (weight,), (shift,))

    def stock(*args: Any) -> Tensor:
        x, weight, shift, *rest = args[:count]
        return common.stock(name, (Conv.of(weight, *args[count:]),), x, rest[0] if rest else None, (weight,), (shift,))

    def fake(*args: Any) -> Tensor:
        x, weight = args[0], args[1]
        stride, padding, dilation, groups = args[count:]
        conv = Conv(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], stride, padding, dilation, groups)
        shape = (x.shape[0], weight.shape[0], *conv.output_size(x.shape[2], x.shape[3]))
        return common.empty_result(shape, x, calls.memory_format(x, weight))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight = inputs[0], inputs[1]
        stride, padding, dilation, groups = inputs[count:]
        ctx.geometry = Conv.of(weight, stride, padding, dilation, groups).flatten()
        ctx.save_for_backward(x, weight, *((output,) if relu else ()))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *output = ctx.saved_tensors
        if relu:
            grad = common.relu_backward(grad, output[0])
        needed = ctx.needs_input_grad[:3]
        grads = common.convolution_backward(grad, x, weight, ctx.geometry, needed)
        return (*grads, *((grad,) if residual else ()), None, None, None, None)

    common.register(schema, eager, fake)
    common.register_autograd(name, setup_context, backward)
    operator = getattr(torch.ops.resnet_fused, name).default

    def call(*args: Any) -> Tensor:
        if calls.plain_eager(*args[:count]):
            return eager(*args)
        return stock(*args) if calls.stock_only() else operator(*args)

    return call
