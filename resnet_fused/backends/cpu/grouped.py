"""Convolutions of several groups, by direct sums: depthwise ones, and groups of any width; csrc/cpu/grouped.h."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.convolution import why_not_any
from resnet_fused.backends.cpu.packing import padded_bias
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Conv, Kind, Problem


class _Groups(Implementation):
    """What both share: one kernel, whose sums are float32 for every dtype."""

    kinds = frozenset({Kind.CONVOLUTION})

    def plans(self, problem: Problem) -> list[str]:
        return [self.name]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        conv, epilogue = problem.conv, problem.epilogue

        def pack() -> tuple[Tensor, Tensor]:
            (weight,), (bias,) = parameters.tensors()
            weight = weight.detach().contiguous(memory_format=torch.channels_last)
            return torch.ops.resnet_fused_cpu.pack_grouped(weight, conv.groups), padded_bias(bias)

        weight, bias = parameters.pack(("cpu", "grouped"), pack)
        out_channels, groups, geometry = conv.out_channels, conv.groups, conv.geometry

        def record(chain: Chain, x: int, residual: int | None) -> int:
            added = residual if epilogue.residual else None
            return chain.conv(x, added, weight, bias, out_channels, groups, geometry, epilogue, parameters, [])

        return in_its_format(ChainKernel(problem, record), problem)


class Depthwise(_Groups):
    """One channel a group: 3×3, 5×5 and 7×7."""

    name = "depthwise"

    def why_not(self, problem: Problem) -> str | None:
        if not _depthwise(problem.conv):
            return "it serves depthwise convolutions, of as many groups as input and output channels"
        return why_not_any(problem) or _why_not_geometry(problem.conv, (3, 5, 7))


class Grouped(_Groups):
    """Several groups of any width: 3×3."""

    name = "grouped"

    def why_not(self, problem: Problem) -> str | None:
        if problem.conv.groups == 1 or _depthwise(problem.conv):
            return "it serves convolutions of several groups that aren't depthwise"
        return why_not_any(problem) or _why_not_geometry(problem.conv, (3,))


def why_not_groups(conv: Conv) -> str | None:
    """Why the kernel doesn't serve the geometry of a convolution of several groups; None if it does."""
    return _why_not_geometry(conv, (3, 5, 7) if _depthwise(conv) else (3,))


def _depthwise(conv: Conv) -> bool:
    return conv.in_channels == conv.out_channels == conv.groups != 1


def _why_not_geometry(conv: Conv, kernels: tuple[int, ...]) -> str | None:
    """Why a grouped convolution's geometry isn't served; None if it is."""
    size, stride = conv.kernel[0], conv.stride[0]
    served = size in kernels and conv.kernel == (size, size) and stride in (1, 2) and conv.stride == (stride, stride)
    if served and conv.dilation == (1, 1):
        return None
    sizes = " and ".join(f"{size}×{size}" for size in kernels)
    return f"it serves grouped convolutions of {sizes} with a stride of 1 or 2 both ways and no dilation"
