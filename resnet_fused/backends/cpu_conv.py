"""A training convolution on the CPU kernels: which of its three products they compute, and the calls.

The products are y = conv2d(x, w), the gradient of x and the gradient of w. Each goes to our kernels where they were measured to
be faster than oneDNN's, inside of ResNet-50 training steps (docs/training.md), and stays stock PyTorch's elsewhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import choice, cpu_plan, get
from resnet_fused.backends.problem import Conv, Problem


Plan = tuple[int, ...]


class Products(NamedTuple):
    """Which products our kernels compute.

    Attributes:
        forward, input: the plans of y and of the gradient of x, as resnet_fused_cpu::training_conv takes them: empty for the
            direct sum. None: stock PyTorch's.
        weight: the gradient of the weights.
        weight_winograd: that by Winograd, instead of the plain sum.
    """

    forward: Plan | None = None
    input: Plan | None = None
    weight: bool = False
    weight_winograd: bool = False


NONE = Products()

# With fewer channels the transforms outweigh the products, or the register tile isn't filled.
_ENOUGH_CHANNELS = 64
# Weights change with every step, so that their transform is part of the time: few pixels don't pay. In bfloat16 the direct
# sum runs at twice the rate, and it takes more of them.
_ENOUGH_PIXELS = {torch.float32: 1024, torch.bfloat16: 4096}
_ENOUGH_TILES = {torch.float32: 128, torch.bfloat16: 256}  # of 4×4 pixels, for the gradient of the weights


def products(x: Tensor, weight_shape: tuple[int, ...], stride: int, padding: int) -> Products:
    """The products of a convolution without dilation or groups, of square kernel, that our kernels compute."""
    if x.device.type != "cpu" or x.dtype not in _ENOUGH_PIXELS:
        return NONE
    return _products(tuple(x.shape), weight_shape[0], weight_shape[2], stride, padding, x.dtype, choice())


# As in backends/norm.py: torch.compile takes the result as a constant.
products._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=512)
def _products(
    shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, padding: int, dtype: torch.dtype, chosen: str
) -> Products:
    if chosen not in ("auto", "cpu") or get("cpu").unavailable() is not None:
        return NONE
    n, in_channels, h, w = shape
    if (kernel, padding) not in ((1, 0), (3, 1)) or stride not in (1, 2) or 0 in shape:
        return NONE
    if min(in_channels, out_channels) < _ENOUGH_CHANNELS:
        return NONE
    library = torch.ops.resnet_fused_cpu
    if dtype == torch.bfloat16 and (not library.avx512_bf16() or library.amx_bf16()):
        return NONE
    if kernel == 1:
        # The direct sum takes bfloat16 channels in pairs.
        pairs = dtype == torch.float32 or (in_channels % 2 == 0 and out_channels % 2 == 0)
        return Products(() if pairs else None, () if pairs and stride == 1 else None, True)
    if stride == 2:
        return Products(weight=True)
    tiles = n * -(-h // 4) * -(-w // 4)
    by_winograd = n * h * w >= _ENOUGH_PIXELS[dtype]
    forward, input = (
        _winograd((n, c, h, w), results, dtype) if by_winograd else None
        for c, results in ((in_channels, out_channels), (out_channels, in_channels))
    )
    return Products(forward, input, True, tiles >= _ENOUGH_TILES[dtype])


def _winograd(shape: tuple[int, int, int, int], out_channels: int, dtype: torch.dtype) -> Plan | None:
    """The plan of a 3×3 convolution of stride 1; None for images smaller than a tile, which they leave mostly empty."""
    conv = Conv(shape[1], out_channels, (3, 3), (1, 1), (1, 1))
    plan = cpu_plan.winograd(Problem("conv2d_bn", shape, dtype, torch.device("cpu"), (conv,)))
    return None if plan is None else tuple(map(int, plan))


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int, plan: Plan) -> Tensor:
    """conv2d(x, weight) in channels_last. Weights may be float32 where x is bfloat16."""
    return _convolution(x, weight, stride, padding, False, plan)


def input_gradient(dy: Tensor, weight: Tensor, padding: int, plan: Plan) -> Tensor:
    """Gradient of x, in channels_last, for stride 1."""
    return _convolution(dy, weight, 1, padding, True, plan)


def _convolution(x: Tensor, weight: Tensor, stride: int, padding: int, turned: bool, plan: Plan) -> Tensor:
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.ops.resnet_fused_cpu.training_conv(x, weight, stride, padding, turned, plan)


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, stride: int, padding: int, by_winograd: bool) -> Tensor:
    """Gradient of the weights in float32, in channels_last."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    gradient = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, kernel, stride, padding, by_winograd)
    return gradient.permute(0, 3, 1, 2)
