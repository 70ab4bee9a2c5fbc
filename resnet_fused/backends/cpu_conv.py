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
        forward, input: the plans of y and of the gradient of x, as resnet_fused_cpu::training_conv and input_gradient take
            them: empty for the direct sum. None: stock PyTorch's.
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
# Values of x that make Winograd worth its calls: small layers are done sooner without. (Whether they are worth the transform of
# the weights is the plan's matter.) In bfloat16 the direct sum runs at twice the rate, and it takes more of them.
_ENOUGH_VALUES = {torch.float32: 64 * 1024, torch.bfloat16: 256 * 1024}
# Pixels of a result in bfloat16 that make the direct sum of a 3×3 faster than oneDNN's where Winograd doesn't pay: rows
# that nearly fill a register tile, with stride 2; or few pixels in all.
_WIDE_ROW, _FEW_PIXELS = 8, 28
_ENOUGH_TILES = {torch.float32: 128, torch.bfloat16: 256}  # of 4×4 pixels, for the gradient of the weights


def products(x: Tensor, weight_shape: tuple[int, ...], stride: int, padding: int) -> Products:
    """The products of a convolution without dilation or groups, of square kernel, that our kernels compute."""
    if x.device.type != "cpu" or x.dtype not in _ENOUGH_VALUES:
        return NONE
    return _products(tuple(x.shape), weight_shape[0], weight_shape[2], stride, padding, x.dtype, choice())


# A batch of a ResNet's training: what is asked for where an input's size isn't known.
_TYPICAL_BATCH, _TYPICAL_SIZE = 16, 56


def products_of_any_size(
    device_type: str, dtype: torch.dtype, weight_shape: tuple[int, ...], stride: int, padding: int
) -> Products:
    """As `products`, for inputs of a size that isn't known yet: as those of a typical one."""
    if device_type != "cpu" or dtype not in _ENOUGH_VALUES:
        return NONE
    shape = (_TYPICAL_BATCH, weight_shape[1], _TYPICAL_SIZE, _TYPICAL_SIZE)
    return _products(shape, weight_shape[0], weight_shape[2], stride, padding, dtype, choice())


# As in backends/norm.py: torch.compile takes the result as a constant. For `products` it would have to compute x.
products_of_any_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    # The direct sum takes bfloat16 channels in pairs.
    direct = () if dtype == torch.float32 or (in_channels % 2 == 0 and out_channels % 2 == 0) else None
    if kernel == 1:
        return Products(direct, direct, True)
    forward = _winograd(shape, Conv(in_channels, out_channels, (3, 3), (stride, stride), (1, 1)), dtype)
    out_h, out_w = -(-h // stride), -(-w // stride)
    few = dtype == torch.bfloat16 and out_h * out_w <= _FEW_PIXELS
    if forward is None and (few or (dtype == torch.bfloat16 and stride == 2 and out_w >= _WIDE_ROW)):
        forward = direct
    if stride == 2:
        return Products(forward, direct, True)
    tiles = n * -(-h // 4) * -(-w // 4)
    input = _winograd((n, out_channels, h, w), Conv(out_channels, in_channels, (3, 3), (1, 1), (1, 1)), dtype)
    if input is None and few:
        input = direct
    return Products(forward, input, True, tiles >= _ENOUGH_TILES[dtype])


def _winograd(shape: tuple[int, ...], conv: Conv, dtype: torch.dtype) -> Plan | None:
    """The plan of a 3×3 convolution; None where Winograd doesn't pay."""
    n, c, h, w = shape
    if n * c * h * w < _ENOUGH_VALUES[dtype]:
        return None
    plan = cpu_plan.winograd(Problem("conv2d_bn", (n, c, h, w), dtype, torch.device("cpu"), (conv,)))
    return None if plan is None else tuple(map(int, plan))


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int, plan: Plan) -> Tensor:
    """conv2d(x, weight) in channels_last. Weights may be float32 where x is bfloat16."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.ops.resnet_fused_cpu.training_conv(x, weight, stride, padding, plan)


def input_gradient(dy: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int, plan: Plan) -> Tensor:
    """Gradient of x, whose height and width are `size`, in channels_last."""
    dy, weight = (t.contiguous(memory_format=torch.channels_last) for t in (dy, weight))
    return torch.ops.resnet_fused_cpu.input_gradient(dy, weight, *size, stride, padding, plan)


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, stride: int, padding: int, by_winograd: bool) -> Tensor:
    """Gradient of the weights in float32, in channels_last."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    gradient = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, kernel, stride, padding, by_winograd)
    return gradient.permute(0, 3, 1, 2)
