"""Random convolution problems and what stock PyTorch makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backends import ConvParameters
from resnet_fused.backends.problem import Conv, Problem
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock


@dataclass(frozen=True)
class Case:
    """One convolution; `why` says what it is there for."""

    why: str
    shape: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    op: str = "conv2d_bn_add_relu"
    dtype: torch.dtype = torch.float32

    @property
    def problem(self) -> Problem:
        conv = Conv(self.shape[1], self.k, self.kernel, self.stride, self.padding, self.dilation, self.groups)
        return problem_of(self.op, self.shape, self.dtype, torch.device("cpu"), (conv,))

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, bias and residual, all channels_last."""
        generator = torch.Generator().manual_seed(7)
        c = self.shape[1] // self.groups
        shapes = self.shape, (self.k, c, *self.kernel), self.problem.output_shape()
        x, weight, residual = (torch.randn(shape, generator=generator) for shape in shapes)
        weight /= (c * self.kernel[0] * self.kernel[1]) ** 0.5
        x, weight, residual = (t.to(self.dtype, memory_format=torch.channels_last) for t in (x, weight, residual))
        return x, weight, torch.randn(self.k, generator=generator).to(self.dtype), residual

    def folded(self) -> ConvParameters:
        _, weight, bias, _ = self.tensors()
        return ConvParameters((weight,), (bias,))

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)


def stock(case: Case, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The op as stock PyTorch computes it."""
    y = F.conv2d(x, weight, bias, *case.geometry)
    if case.op == "conv2d_bn_add_relu":
        y = y + residual
    return y if case.op == "conv2d_bn" else y.relu()


def fused(case: Case, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The op as resnet_fused computes it, on the backend in use."""
    rest = (residual,) if case.op == "conv2d_bn_add_relu" else ()
    return getattr(functional, case.op)(x, weight, bias, *rest, *case.geometry)


def check(case: Case, y: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """y is as near to float64 as stock PyTorch at the same type, within a factor of two."""
    truth = stock(case, *(t.double() for t in tensors))
    assert_as_good_as_stock(y, stock(case, *tensors), truth)
