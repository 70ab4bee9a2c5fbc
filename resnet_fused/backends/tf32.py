"""TF32, float32 with 10 bits of mantissa as tensor cores multiply it: rounding, and what exact sums of such products are."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import Conv, ConvParameters, Kernel, Problem
from resnet_fused.backends.reference.backend import StockOps, conv2d


def to_tf32(t: Tensor) -> Tensor:
    """float32 rounded to TF32 as cvt.rna.tf32 does it: to nearest, ties away from zero; NaN and Inf stay what they are.

    Tensor cores read float32 without the low 13 bits. They would make an Inf of a NaN that has no others, so that every NaN
    becomes the usual one.
    """
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, torch.where(t.isnan(), torch.nan, t))


def used(problem: Problem) -> bool:
    """Whether kernels for a problem compute in TF32 now: where it is allowed, on an NVIDIA GPU that has it."""
    if problem.device.type != "cuda" or torch.version.hip is not None or not problem.tf32_allowed():
        return False
    return torch.cuda.get_device_capability(problem.device) >= (8, 0)


def exact(problem: Problem, parameters: ConvParameters) -> Kernel:
    """The problem in float64, but for what a convolution multiplies, which is rounded to TF32: of x and residual in float32.

    Its error is the least that a kernel in TF32 can have. Stock's alone is no yardstick for one: cuDNN takes float32 for
    some problems though TF32 is allowed.
    """
    kernel = StockOps(_rounded_conv2d).prepare(problem.with_dtype(torch.float64), parameters.to(torch.float64), None)
    return lambda x, residual: kernel(x.double(), None if residual is None else residual.double())


def _rounded_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    return conv2d(to_tf32(x.float()).double(), to_tf32(weight.float()).double(), bias, conv)
