"""conv2d: y = conv2d(x, weight) in training, where the compiled CPU kernels compute y and the gradient of x faster.

They do so by Winograd's algorithm for 3×3 filters of stride 1 on enough pixels; the gradient of x is itself such a convolution,
of dy with the filters turned round. Weights change with every step, so they are transformed at every call, which is why few
pixels don't pay. The gradient of the weights is stock PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Conv, Folded, Problem, choice, cpu_plan, resolve
from resnet_fused.ops import common

# Where the kernels were measured to be faster than oneDNN, the transform of the weights included: 1.25 times at 1600 pixels of
# a batch, twice at 6400, but slower at 400 (64 to 512 channels, 2 cores of an EPYC 9004).
_ENOUGH_PIXELS = 1024
_ENOUGH_CHANNELS = 64
_GEOMETRY = [1, 1, 1, 1, 1, 1, 1]  # stride, padding, dilation, groups


def served(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether this op serves the convolution, and is faster than stock PyTorch."""
    if (*stride, *padding, *dilation, groups) != (1,) * 7 or weight.shape[2:] != (3, 3) or x.dim() != 4:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1] != weight.shape[1]:
        return False
    n, c, h, w = x.shape
    if min(c, weight.shape[0]) < _ENOUGH_CHANNELS:
        return False
    return n * h * w >= _ENOUGH_PIXELS and _serves((n, c, h, w), weight.shape[0])


def _serves(shape: tuple[int, int, int, int], out_channels: int) -> bool:
    forward, backward = _problem(shape, out_channels), _problem((shape[0], out_channels, *shape[2:]), shape[1])
    return all(resolve(p, choice()).name == "cpu" and cpu_plan.winograd(p) is not None for p in (forward, backward))


# As in backends/norm.py: torch.compile takes the result as a constant.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _problem(shape: tuple[int, int, int, int], out_channels: int, format: torch.memory_format = torch.channels_last) -> Problem:
    conv = Conv(shape[1], out_channels, (3, 3), (1, 1), (1, 1))
    return Problem("conv2d_bn", shape, torch.float32, torch.device("cpu"), (conv,), memory_format=format)


def _run(x: Tensor, weight: Tensor, format: torch.memory_format) -> Tensor:
    n, c, h, w = x.shape
    problem = _problem((n, c, h, w), weight.shape[0], format)
    folded = Folded((weight,), (weight.new_zeros(weight.shape[0]),))
    return resolve(problem, "cpu").prepare(problem, folded)(x, None)


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return _run(x, weight, common.memory_format(x, weight))


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return common.empty_result((x.shape[0], weight.shape[0], *x.shape[2:]), x, common.memory_format(x, weight))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad
    if torch.is_grad_enabled():
        # A second derivative is asked for: stock's formula has one.
        return common.convolution_backward(dy, x, weight, _GEOMETRY, (need_x, need_weight, False))[:2]
    dx = dweight = None
    if need_x:
        turned = weight.flip(2, 3).transpose(0, 1)
        dx = conv2d(dy, turned)
    if need_weight:
        _, dweight, _ = common.convolution_backward(dy, x, weight, _GEOMETRY, (False, True, False))
    return dx, dweight


common.register("conv2d(Tensor x, Tensor weight) -> Tensor", _eager, _fake)
common.register_autograd("conv2d", _setup_context, _backward)


class _Function(torch.autograd.Function):
    forward = staticmethod(_eager)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(x, weight, padding=1) for what `served` says it serves."""
    if not common.plain(x, weight):
        return torch.ops.resnet_fused.conv2d.default(x, weight)
    return _Function.apply(x, weight) if common.needs_grad(x, weight) else _eager(x, weight)
