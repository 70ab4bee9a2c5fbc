"""bn_relu_conv2d: z = conv2d(y, filter) + filter_bias with y = bn_relu(x), where y isn't kept for backward but computed again.

y is as large as x. Of a BasicBlock in training a quarter of the activations go that way, of a Bottleneck a sixth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import batch_norm, common
from resnet_fused.runtime import calls


def _geometry(stride: Any, padding: Any, dilation: Any, groups: int) -> list[int]:
    return [*stride, *padding, *dilation, groups]


def _eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    filter: Tensor,
    filter_bias: Tensor | None,
    eps: float,
    group: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> batch_norm.Result:
    y, *statistics = batch_norm.forward("bn_relu", x, None, weight, bias, mean, var, eps, group)
    z = F.conv2d(y, filter, filter_bias, stride, padding, dilation, groups)
    return z, statistics[0], statistics[1], statistics[2]


def _fake(*args: Any) -> batch_norm.Result:
    x, _, _, mean, _, filter, filter_bias, _, _, *geometry = args
    y, *statistics = batch_norm.fake_forward(x, mean is None)
    return F.conv2d(y, filter, filter_bias, *geometry), statistics[0], statistics[1], statistics[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: batch_norm.Result) -> None:
    x, weight, bias, mean, var, filter, _, ctx.eps, ctx.group, *geometry = inputs
    ctx.geometry = _geometry(*geometry)
    ctx.batch = mean is None
    if ctx.batch:
        mean, var = output[1:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, filter)


def _backward(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dz is None:
        return (None,) * 13
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a second derivative through a block with memory_efficient=True is not defined; "
            "set block.memory_efficient = False, or call backward without create_graph=True."
        )
    x, weight, bias, mean, var, filter = ctx.saved_tensors
    needed = ctx.needs_input_grad
    # With the statistics as given constants, the forward op computes y again as it was.
    if calls.plain(dz, x, weight, bias, filter):
        y = batch_norm.forward("bn_relu", x, None, weight, bias, mean, var, ctx.eps, "")[0]
        bn_backward: Callable[..., batch_norm.Result] = batch_norm.backward
    else:
        y = torch.ops.resnet_fused.bn_relu.default(x, weight, bias, mean, var, ctx.eps, "")[0]
        bn_backward = torch.ops.resnet_fused.bn_backward.default
    parameters = needed[1] or needed[2]
    through = needed[0] or parameters
    wanted = (through, needed[5], needed[6])
    dy, dfilter, dfilter_bias = common.convolution_backward(dz, y, filter, ctx.geometry, wanted)
    dx = dweight = dbias = None
    if through:
        needs = (needed[0], False, parameters)
        dx, _none, dweight, dbias = bn_backward("bn_relu", dy, x, y, weight, mean, var, ctx.eps, ctx.batch, ctx.group, needs)
    grads = (dx, dweight, dbias, None, None, dfilter, dfilter_bias)
    return (*(grad if needed[i] else None for i, grad in enumerate(grads)), *(None,) * 6)


common.register(
    "bn_relu_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor filter, Tensor? filter_bias, "
    "float eps, str group, int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor, Tensor, Tensor)",
    _eager,
    _fake,
    lambda x, weight, bias, mean, var, filter, filter_bias, eps, group, *geometry: F.conv2d(x, filter, filter_bias, *geometry),
)
common.register_autograd("bn_relu_conv2d", _setup_context, _backward)
_Function = common.function("bn_relu_conv2d", _eager, _setup_context, _backward)


def bn_relu_conv2d(*args: Any) -> batch_norm.Result:
    """z, and the batch's mean, biased and unbiased variance; arguments as the schema lists them."""
    tensors = args[:7]
    if not calls.plain(*tensors):
        return torch.ops.resnet_fused.bn_relu_conv2d.default(*args)
    return _Function.apply(*args) if calls.needs_grad(*tensors) else _eager(*args)
