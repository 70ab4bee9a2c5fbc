"""Parameters as the kernels of csrc/cpu take them, made once for all problems that use them."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters
from resnet_fused.backends.cpu import plan
from resnet_fused.backends.problem import Conv


def padded_bias(bias: Tensor) -> Tensor:
    """The bias as the kernels read it: float32, with zeros up to whole panels."""
    panel = torch.ops.resnet_fused_cpu.panel()
    padded = bias.new_zeros(-(-bias.numel() // panel) * panel, dtype=torch.float32)
    padded[: bias.numel()] = bias.detach()
    return padded


def packed(parameters: ConvParameters, conv: Conv, winograd: bool) -> tuple[Tensor, Tensor]:
    """Weights of one convolution as its kernel takes them, and the padded bias."""
    transformed = winograd and plan.keeps_transformed(conv)

    def pack() -> tuple[Tensor, Tensor]:
        (weight,), (bias,) = parameters.tensors()
        weight = torch.ops.resnet_fused_cpu.pack(weight.detach().contiguous(memory_format=torch.channels_last), winograd)
        if transformed:
            weight = torch.ops.resnet_fused_cpu.transform(weight, conv.in_channels, conv.out_channels, conv.stride[0])
        return weight, padded_bias(bias)

    return parameters.pack(("cpu", winograd, transformed), pack)
