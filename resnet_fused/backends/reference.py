"""Stock PyTorch, op by op: the truth that other backends are compared with, and the fall-back that serves everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import Kernel
from resnet_fused.backends.norm import NormKernels
from resnet_fused.backends.problem import Conv, Folded, Problem
from resnet_fused.backends.reference_bn import ReferenceNorm


def conv2d(x: Tensor, weight: Tensor, shift: Tensor, conv: Conv) -> Tensor:
    """conv2d(x, weight) + shift."""
    if conv.fails_in_channels_last(x.shape[3]):
        x, weight = x.contiguous(), weight.contiguous()
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class Reference:
    """Stock PyTorch ops on folded weights."""

    name = "reference"
    conv2d = staticmethod(conv2d)

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def wins(self, problem: Problem) -> bool:
        return True

    def prepare(self, problem: Problem, folded: Folded) -> Kernel:
        op, convs, conv2d = problem.op, problem.convs, self.conv2d
        weights, shifts = folded.plain()

        def add_relu(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            return x.add(residual).relu_()

        def conv2d_bn_add_relu(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            return conv2d(x, weights[0], shifts[0], convs[0]).add_(residual).relu_()

        if op == "add_relu":
            return add_relu
        if op == "add_relu_backward":
            return lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0)
        if op in ("basic_block", "bottleneck"):
            return lambda x, residual: self._block(x, weights, shifts, convs, problem.shortcut)
        weight, shift, conv = weights[0], shifts[0], convs[0]
        if op == "conv2d":
            return lambda x, residual: F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        if op == "conv2d_bn":
            return lambda x, residual: conv2d(x, weight, shift, conv)
        if op == "conv2d_bn_relu":
            return lambda x, residual: conv2d(x, weight, shift, conv).relu_()
        if op == "conv2d_bn_add_relu":
            return conv2d_bn_add_relu
        if op == "stem":
            pool = problem.pool
            assert pool is not None
            return lambda x, residual: F.max_pool2d(conv2d(x, weight, shift, conv).relu_(), *pool)
        raise AssertionError(f"unknown op {op!r}")

    def _block(
        self, x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], convs: tuple[Conv, ...], shortcut: bool
    ) -> Tensor:
        """relu(conv_n(… relu(conv_1(x)) …) + shortcut(x)), for any number of convolutions on the main path."""
        layers = list(zip(weights, shifts, convs, strict=True))
        residual = x
        if shortcut:
            residual = self.conv2d(x, *layers.pop())
        *inner, last = layers
        y = x
        for layer in inner:
            y = self.conv2d(y, *layer).relu_()
        return self.conv2d(y, *last).add_(residual).relu_()

    def norm(self) -> NormKernels:
        return ReferenceNorm()
