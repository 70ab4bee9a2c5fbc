"""The common part of basic_block and bottleneck, which differ in the number of convolutions on the main path.

    y = relu(conv_n(… relu(conv_1(x)) …) + shortcut(x)), every conv with its batch norm folded in

`weights` and `shifts` list the main path in order, then the projection shortcut if there is one; without it the shortcut is
the identity. `geometry` has seven integers for each convolution: stride, padding, dilation (two each) and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Conv
from resnet_fused.backends.reference import conv2d
from resnet_fused.ops import common
from resnet_fused.runtime import calls


def define(name: str, *, main: int) -> Callable[..., Tensor]:
    """Registers resnet_fused::`name`, with `main` convolutions on the main path, and gives the function that calls it."""

    def eager(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        runner = common.runner_for(weights[0], name, Conv.unflatten(weights, geometry), len(weights) > main)
        return runner(x, None, weights, shifts)

    def fake(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        h, w = x.shape[2:]
        for i in range(main):
            stride, padding, dilation = (geometry[7 * i + j : 7 * i + j + 2] for j in (0, 2, 4))
            conv = Conv(0, 0, weights[i].shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
            h, w = conv.output_size(h, w)
        shape = (x.shape[0], weights[main - 1].shape[0], h, w)
        return common.empty_result(shape, x, calls.memory_format(x, *weights))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, shifts, ctx.geometry = inputs
        ctx.count = len(weights)
        ctx.save_for_backward(x, output, *weights, *shifts)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, *parameters = ctx.saved_tensors
        weights, shifts = parameters[: ctx.count], parameters[ctx.count :]
        convs = Conv.unflatten(weights, ctx.geometry)
        # The results inside of the block aren't kept by the forward pass; they are computed again.
        inputs = [x]
        for i in range(main - 1):
            inputs.append(conv2d(inputs[-1], weights[i], shifts[i], convs[i]).relu())
        grad = common.relu_backward(grad, y)
        dweights: list[Tensor | None] = [None] * ctx.count
        dshifts: list[Tensor | None] = [None] * ctx.count

        def through(i: int, source: Tensor, grad: Tensor) -> Tensor:
            """Gradient by the input of convolution i; keeps those of its parameters."""
            grads = common.convolution_backward(grad, source, weights[i], convs[i].flatten(), (True, True, True))
            dweights[i], dshifts[i] = grads[1:]
            assert grads[0] is not None
            return grads[0]

        dx = through(main, x, grad) if ctx.count > main else grad
        for i in reversed(range(main)):
            grad = through(i, inputs[i], grad)
            if i > 0:
                grad = common.relu_backward(grad, inputs[i])
        return dx + grad, dweights, dshifts, None

    common.register(f"{name}(Tensor x, Tensor[] weights, Tensor[] shifts, int[] geometry) -> Tensor", eager, fake)
    common.register_autograd(name, setup_context, backward)
    operator = getattr(torch.ops.resnet_fused, name).default

    def call(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        if calls.plain_eager(x, *weights, *shifts):
            return eager(x, weights, shifts, geometry)
        if calls.stock_only():
            return common.stock(name, Conv.unflatten(weights, geometry), x, None, weights, shifts, len(weights) > main)
        return operator(x, weights, shifts, geometry)

    return call
