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


class Products(NamedTuple):
    """Which products our kernels compute.

    Attributes:
        forward, input: y and the gradient of x, by Winograd.
        weight: the gradient of the weights.
        weight_winograd: that by Winograd, instead of the plain sum.
    """

    forward: bool = False
    input: bool = False
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
    winograd = kernel == 3 and stride == 1
    # Images smaller than a tile leave most of it empty, and have no plan.
    forward = winograd and n * h * w >= _ENOUGH_PIXELS[dtype] and _plan(shape, out_channels, dtype) is not None
    tiles = n * -(-h // 4) * -(-w // 4)
    return Products(forward, forward, True, winograd and tiles >= _ENOUGH_TILES[dtype])


def _plan(shape: tuple[int, ...], out_channels: int, dtype: torch.dtype) -> cpu_plan.WinogradPlan | None:
    n, c, h, w = shape
    conv = Conv(c, out_channels, (3, 3), (1, 1), (1, 1))
    return cpu_plan.winograd(Problem("conv2d_bn", (n, c, h, w), dtype, torch.device("cpu"), (conv,)))


def winograd(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1) in channels_last, for 3×3 filters."""
    out_channels = weight.shape[0]
    plan = _plan(tuple(x.shape), out_channels, x.dtype)
    assert plan is not None
    library = torch.ops.resnet_fused_cpu
    panel = library.panel()
    shift = torch.zeros(-(-out_channels // panel) * panel)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = [3, 3, 1, 1, 1, 1, 1, 1]
    return library.conv(x, library.pack(weight.contiguous()), shift, None, out_channels, geometry, False, [*map(int, plan)])


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, stride: int, padding: int, by_winograd: bool) -> Tensor:
    """Gradient of the weights in float32, in channels_last."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    gradient = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, kernel, stride, padding, by_winograd)
    return gradient.permute(0, 3, 1, 2)
