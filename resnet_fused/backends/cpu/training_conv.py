"""A convolution in training on the CPU kernels: which of its three products they compute, and the calls.

The products are y = conv2d(x, w), the gradient of x and the gradient of w. Each goes to our kernels where they were measured to
be faster than oneDNN's, inside of ResNet-50 training steps (docs/training.md), and stays stock PyTorch's elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation
from resnet_fused.backends.cpu import plan
from resnet_fused.backends.cpu.grouped import why_not_groups
from resnet_fused.backends.problem import Conv, Kind, Problem, Shape, TrainingConv
from resnet_fused.backends.training_conv import TrainingConvKernels

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


# With fewer channels the transforms outweigh the products, or the register tile isn't filled.
_ENOUGH_CHANNELS = 64
# Values of x that make Winograd worth its calls: small layers are done sooner without. (Whether they are worth the transform of
# the weights is the plan's matter.) In bfloat16 the direct sum runs at twice the rate, and it takes more of them.
_ENOUGH_VALUES = {torch.float32: 64 * 1024, torch.bfloat16: 256 * 1024}
# Pixels of a result in bfloat16 that make the direct sum of a 3×3 faster than oneDNN's where Winograd doesn't pay: rows
# that nearly fill a register tile, with stride 2; or few pixels in all.
_WIDE_ROW, _FEW_PIXELS = 8, 28
_ENOUGH_TILES = {torch.float32: 128, torch.bfloat16: 256}  # of 4×4 pixels, for the gradient of the weights


class TrainingConvolution(Implementation):
    """1×1 and 3×3 convolutions, and grouped ones; csrc/cpu/input_gradient.h, weight_gradient.h, grouped.h."""

    name = "training"
    kinds = frozenset({Kind.TRAINING_CONV})

    def why_not(self, problem: Problem) -> str | None:
        return None if any(p not in (None, False) for p in _products_of(problem)) else "stock's products are as fast"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> TrainingConvKernels:
        conv, found = _conv(problem), _products_of(problem)
        kernel, stride, padding = conv.kernel[0], conv.stride[0], conv.padding[0]
        by_winograd = found.weight_winograd
        if conv.groups != 1:
            by_groups = partial(_gradient_of_groups, conv.groups, padding)
            return TrainingConvKernels(
                partial(_grouped, conv.groups, stride, padding), None if found.input is None else by_groups
            )
        return TrainingConvKernels(
            None if found.forward is None else partial(_forward, stride, padding, found.forward),
            None if found.input is None else partial(_input_gradient, stride, padding, found.input),
            partial(_weight_gradient, kernel, stride, padding, by_winograd) if found.weight else None,
            saves_most=bool(found.forward),
        )


def _conv(problem: Problem) -> Conv:
    operation = problem.steps[0].operation
    assert isinstance(operation, TrainingConv)
    return operation.conv


def _products_of(problem: Problem) -> Products:
    conv, dtype = _conv(problem), problem.types.source
    if conv.kernel[0] != conv.kernel[1] or conv.dilation != (1, 1):
        return Products()
    if conv.groups != 1:
        return _of_groups(conv, dtype)
    return products(problem.shape, conv.out_channels, conv.kernel[0], conv.stride[0], conv.padding[0], dtype)


def products(shape: Shape, out_channels: int, kernel: int, stride: int, padding: int, dtype: torch.dtype) -> Products:
    """The products of a convolution of square kernel on x of a shape, in float32 or bfloat16, that our kernels compute."""
    n, in_channels, h, w = shape
    if (kernel, padding) not in ((1, 0), (3, 1)) or stride not in (1, 2) or min(in_channels, out_channels) < _ENOUGH_CHANNELS:
        return Products()
    library = torch.ops.resnet_fused_cpu
    if dtype == torch.bfloat16 and (not library.avx512_bf16() or library.amx_bf16()):
        return Products()
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


def _of_groups(conv: Conv, dtype: torch.dtype) -> Products:
    """The products of a grouped convolution. The gradient of x with stride 1 is such a convolution, of dy."""
    if why_not_groups(conv) is not None or not plan.groups_preferred(conv, dtype):
        return Products()
    if conv.stride != (1, 1) and conv.groups != conv.in_channels:
        # On a Zen 5 oneDNN's is as fast for few groups, and faster for many (RegNetY-016, 16 images of 160²).
        return Products()
    by_groups = conv.stride == (1, 1) and conv.padding[0] < conv.kernel[0]
    return Products((), () if by_groups else None)


def _winograd(shape: Shape, conv: Conv, dtype: torch.dtype) -> Plan | None:
    """The plan of a 3×3 convolution; None where Winograd doesn't pay."""
    n, c, h, w = shape
    if n * c * h * w < _ENOUGH_VALUES[dtype]:
        return None
    found = plan.winograd(Problem.of(conv, shape, dtype, torch.device("cpu")))
    return None if found is None else tuple(map(int, found))


def _forward(stride: int, padding: int, plan: Plan, x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight) in channels_last. Weights may be float32 where x is bfloat16."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.ops.resnet_fused_cpu.training_conv(x, weight, stride, padding, plan)


def _grouped(groups: int, stride: int, padding: int, x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight) of several groups, in channels_last."""
    x, weight = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.ops.resnet_fused_cpu.training_conv(x, weight, stride, padding, [], groups)


def _gradient_of_groups(groups: int, padding: int, dy: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient of x for stride 1: dy convolved with each group's filters turned round, channels in each other's place."""
    out_channels, of_group, kernel, _ = weight.shape
    filters = weight.reshape(groups, out_channels // groups, of_group, kernel, kernel)
    turned = filters.flip(3, 4).transpose(1, 2).reshape(groups * of_group, out_channels // groups, kernel, kernel)
    return _grouped(groups, 1, kernel - 1 - padding, dy, turned)


def _input_gradient(stride: int, padding: int, plan: Plan, dy: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient of x, whose height and width are `size`, in channels_last."""
    dy, weight = (t.contiguous(memory_format=torch.channels_last) for t in (dy, weight))
    return torch.ops.resnet_fused_cpu.input_gradient(dy, weight, *size, stride, padding, plan)


def _weight_gradient(kernel: int, stride: int, padding: int, by_winograd: bool, x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of the weights in float32, in channels_last."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    gradient = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, kernel, stride, padding, by_winograd)
    return gradient.permute(0, 3, 1, 2)
