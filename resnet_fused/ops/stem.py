"""stem: y = max_pool2d(relu(conv2d(x, weight) + bias)), the entry of a ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Activation, Conv, Epilogue, Pool, Step
from resnet_fused.backends.reference.backend import conv2d
from resnet_fused.ops import common
from resnet_fused.runtime import calls


def _eager(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], pool: Sequence[int]) -> Tensor:
    runner = common.runner_for(weight, ("stem", weight.shape, *geometry, *pool), lambda: _steps(weight, geometry, pool))
    return runner(x, None, (weight,), (bias,))


def _stock(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], pool: Sequence[int]) -> Tensor:
    return common.stock_result(_steps(weight, geometry, pool), x, None, [weight], [bias])


def _steps(weight: Tensor, geometry: Sequence[int], pool: Sequence[int]) -> tuple[Step, ...]:
    (conv,) = Conv.unflatten([weight], geometry)
    return (Step(conv, Epilogue(activation=Activation.RELU, pool=_pool(pool))),)


def _pool(pool: Sequence[int]) -> Pool:
    a, b, c, d, e, f = pool
    return Pool((a, b), (c, d), (e, f))


def _fake(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], pool: Sequence[int]) -> Tensor:
    stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:6]
    conv = Conv(0, 0, weight.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
    h, w = conv.output_size(x.shape[2], x.shape[3])
    shape = (x.shape[0], weight.shape[0], *_pool(pool).output_size(h, w))
    return common.empty_result(shape, x, calls.memory_format(x, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.geometry, ctx.pool = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    # The result before the pool is four times the size of the stem's own; it is computed again instead of kept.
    conv = Conv.unflatten([weight], ctx.geometry)[0]
    y = conv2d(x, weight, bias, conv).relu()
    kernel, stride, padding = ctx.pool[0:2], ctx.pool[2:4], ctx.pool[4:6]
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, kernel, stride, padding)
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, kernel, stride, padding, [1, 1], False, indices)
    grads = common.convolution_backward(common.relu_backward(grad, y), x, weight, conv.flatten(), ctx.needs_input_grad[:3])
    return (*grads, None, None)


# Schemas are part of saved graphs: they keep the name that the bias had.
common.register("stem(Tensor x, Tensor weight, Tensor shift, int[] geometry, int[] pool) -> Tensor", _eager, _fake, _stock)
common.register_autograd("stem", _setup_context, _backward)


def stem(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int], pool: Sequence[int]) -> Tensor:
    """max_pool2d(relu(conv2d(x, weight) + bias)); see `resnet_fused.functional.stem`.

    `geometry`: stride, padding, dilation (two integers each) and groups; `pool`: kernel, stride and padding (two each).
    """
    if calls.plain_eager(x, weight, bias):
        return _eager(x, weight, bias, geometry, pool)
    if calls.stock_only():
        return _stock(x, weight, bias, geometry, pool)
    return torch.ops.resnet_fused.stem.default(x, weight, bias, geometry, pool)
