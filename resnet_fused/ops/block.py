"""basic_block and bottleneck: the residual blocks of ResNet-18 and -34, and of ResNet-50, -101 and -152.

    y = relu(conv_n(… relu(conv_1(x)) …) + shortcut(x)), every conv with its batch norm folded in

`weights` and `biases` list the main path in order, then the projection shortcut if there is one; without it the shortcut is
the identity. `geometry` has seven integers for each convolution: stride, padding, dilation (two each) and groups.

Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnet_fused.backends import Conv
from resnet_fused.backends.problem import Step, residual_block
from resnet_fused.backends.reference.backend import conv2d
from resnet_fused.ops import common
from resnet_fused.runtime import calls

_Item = TypeVar("_Item")


class _Family:
    """The registered operator of a block with `main` convolutions on its main path, and calls of it."""

    def __init__(self, name: str, main: int) -> None:
        self.name, self.main = name, main
        schema = f"{name}(Tensor x, Tensor[] weights, Tensor[] shifts, int[] geometry) -> Tensor"  # saved graphs have this name
        common.register(schema, self._eager, self._fake, self._stock)
        common.register_autograd(name, self._setup_context, self._backward)
        self.operator: Callable[..., Tensor] = getattr(torch.ops.resnet_fused, name).default

    def _steps(self, weights: Sequence[Tensor], geometry: Sequence[int]) -> tuple[Step, ...]:
        convs = Conv.unflatten(weights, geometry)
        return residual_block(convs[: self.main], convs[self.main] if len(convs) > self.main else None)

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        if calls.plain_eager(x, *weights, *biases):
            return self._eager(x, weights, biases, geometry)
        run = self._stock if calls.stock_only() else self.operator
        return run(x, weights, biases, geometry)

    def _stock(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        steps = self._steps(weights, geometry)
        return common.stock_result(steps, x, None, self._in_order(weights), self._in_order(biases))

    def _in_order(self, items: Sequence[_Item]) -> tuple[_Item, ...]:
        """What belongs to the convolutions, in the steps' order: the shortcut's before the main path's."""
        return (*items[self.main :], *items[: self.main])

    def _eager(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        what = (self.name, *geometry, *(weight.shape for weight in weights))
        runner = common.runner_for(weights[0], what, lambda: self._steps(weights, geometry))
        return runner(x, None, self._in_order(weights), self._in_order(biases))

    def _fake(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        h, w = x.shape[2:]
        for i in range(self.main):
            stride, padding, dilation = (geometry[7 * i + j : 7 * i + j + 2] for j in (0, 2, 4))
            conv = Conv(0, 0, weights[i].shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
            h, w = conv.output_size(h, w)
        shape = (x.shape[0], weights[self.main - 1].shape[0], h, w)
        return common.empty_result(shape, x, calls.memory_format(x, *weights))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, biases, ctx.geometry = inputs
        ctx.count = len(weights)
        ctx.save_for_backward(x, output, *weights, *biases)

    def _backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        main = self.main
        x, y, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.count], parameters[ctx.count :]
        convs = Conv.unflatten(weights, ctx.geometry)
        # The results inside of the block aren't kept by the forward pass; they are computed again.
        inputs = [x]
        for i in range(main - 1):
            inputs.append(conv2d(inputs[-1], weights[i], biases[i], convs[i]).relu())
        grad = common.relu_backward(grad, y)
        dweights: list[Tensor | None] = [None] * ctx.count
        dbiases: list[Tensor | None] = [None] * ctx.count

        def through(i: int, source: Tensor, grad: Tensor) -> Tensor:
            """Gradient by the input of convolution i; keeps those of its parameters."""
            grads = common.convolution_backward(grad, source, weights[i], convs[i].flatten(), (True, True, True))
            dweights[i], dbiases[i] = grads[1:]
            assert grads[0] is not None
            return grads[0]

        dx = through(main, x, grad) if ctx.count > main else grad
        for i in reversed(range(main)):
            grad = through(i, inputs[i], grad)
            if i > 0:
                grad = common.relu_backward(grad, inputs[i])
        return dx + grad, dweights, dbiases, None


_basic_block = _Family("basic_block", main=2)
_bottleneck = _Family("bottleneck", main=3)


def basic_block(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
    """Two convolutions and a shortcut; see `resnet_fused.functional.basic_block`."""
    return _basic_block(x, weights, biases, geometry)


def bottleneck(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
    """Three convolutions and a shortcut; see `resnet_fused.functional.bottleneck`."""
    return _bottleneck(x, weights, biases, geometry)
