"""conv2d_bn, conv2d_bn_relu and conv2d_bn_add_relu: a convolution with its batch norm folded in, and what follows it.

y = activation(conv2d(x, weight) + bias + residual)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Activation, Conv, Epilogue, Step
from resnet_fused.backends.problem import RESIDUAL, X
from resnet_fused.ops import common
from resnet_fused.runtime import calls

Pair = Sequence[int]


class _Family:
    """The registered operator of an epilogue, and calls of it: of the kernel directly where that is possible.

    Operands are x, weight, bias and, where the epilogue adds one, residual. They are followed by stride, padding, dilation and
    groups.
    """

    def __init__(self, name: str, epilogue: Epilogue) -> None:
        self.name, self.epilogue = name, epilogue
        # Schemas are part of saved graphs: they keep the name that the bias had.
        tensors = ("x", "weight", "shift", *(("residual",) if epilogue.residual else ()))
        self.count = len(tensors)
        operands = ", ".join(f"Tensor {tensor}" for tensor in tensors)
        schema = f"{name}({operands}, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor"
        common.register(schema, self._eager, self._fake, self._stock)
        common.register_autograd(name, self._setup_context, self._backward)
        self.operator: Callable[..., Tensor] = getattr(torch.ops.resnet_fused, name).default

    def _steps(self, weight: Tensor, *geometry: Any) -> tuple[Step, ...]:
        return (Step(Conv.of(weight, *geometry), self.epilogue, (X, RESIDUAL) if self.epilogue.residual else (X,)),)

    def __call__(self, *args: Any) -> Tensor:
        if calls.plain_eager(*args[: self.count]):
            return self._eager(*args)
        return self._stock(*args) if calls.stock_only() else self.operator(*args)

    def _eager(self, *args: Any) -> Tensor:
        x, weight, bias, *rest = args[: self.count]
        stride, padding, dilation, groups = args[self.count :]
        what = (self.name, weight.shape, *stride, *padding, *dilation, groups)
        runner = common.runner_for(weight, what, lambda: self._steps(weight, *args[self.count :]))
        return runner(x, rest[0] if rest else None, (weight,), (bias,))

    def _stock(self, *args: Any) -> Tensor:
        x, weight, bias, *rest = args[: self.count]
        steps = self._steps(weight, *args[self.count :])
        return common.stock_result(steps, x, rest[0] if rest else None, (weight,), (bias,))

    def _fake(self, *args: Any) -> Tensor:
        x, weight = args[0], args[1]
        stride, padding, dilation, groups = args[self.count :]
        conv = Conv(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], stride, padding, dilation, groups)
        shape = (x.shape[0], weight.shape[0], *conv.output_size(x.shape[2], x.shape[3]))
        return common.empty_result(shape, x, calls.memory_format(x, weight))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight = inputs[0], inputs[1]
        stride, padding, dilation, groups = inputs[self.count :]
        ctx.geometry = Conv.of(weight, stride, padding, dilation, groups).flatten()
        ctx.save_for_backward(x, weight, *((output,) if self.epilogue.relu else ()))

    def _backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *output = ctx.saved_tensors
        if self.epilogue.relu:
            grad = common.relu_backward(grad, output[0])
        needed = ctx.needs_input_grad[:3]
        grads = common.convolution_backward(grad, x, weight, ctx.geometry, needed)
        return (*grads, *((grad,) if self.epilogue.residual else ()), None, None, None, None)


_bn = _Family("conv2d_bn", Epilogue())
_bn_relu = _Family("conv2d_bn_relu", Epilogue(activation=Activation.RELU))
_bn_add_relu = _Family("conv2d_bn_add_relu", Epilogue(residual=True, activation=Activation.RELU))


def conv2d_bn(x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """conv2d(x, weight) + bias; see `resnet_fused.functional.conv2d_bn`."""
    return _bn(x, weight, bias, stride, padding, dilation, groups)


def conv2d_bn_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """relu(conv2d(x, weight) + bias); see `resnet_fused.functional.conv2d_bn_relu`."""
    return _bn_relu(x, weight, bias, stride, padding, dilation, groups)


def conv2d_bn_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """relu(conv2d(x, weight) + bias + residual); see `resnet_fused.functional.conv2d_bn_add_relu`."""
    return _bn_add_relu(x, weight, bias, residual, stride, padding, dilation, groups)
