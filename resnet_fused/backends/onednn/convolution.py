"""oneDNN on CPUs: one primitive a convolution, with bias, residual and ReLU as post-ops and weights packed once.

oneDNN's ReLU is max(y, 0) by an instruction that turns NaN into 0, where stock PyTorch keeps NaN. So it is used only where no
NaN can arise: the result is bounded by ‖w‖₁·max|x| + max|bias| + max|residual|, and if that is far from the largest number,
no sum overflows. Within one call of a program the bound of a result is that of the next layer's input (backends/bounds.py), so
that only the first input, and now and then one in the middle, is looked at. Elsewhere ReLU is a pass of its own, in place,
which was measured to cost less than a look at all of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel, bounds
from resnet_fused.backends.problem import Kind, Problem

# More than a result grows by rounding to bfloat16.
_ROUNDED = 1.01


class PointwiseConvolution(Implementation):
    """mkldnn::_convolution_pointwise and its .binary overload, as TorchInductor uses them."""

    name = "convolution with post-ops"
    kinds = frozenset({Kind.CONVOLUTION, Kind.CONVOLUTION_ND})

    def why_not(self, problem: Problem) -> str | None:
        if problem.epilogue.pool is not None or not problem.epilogue.bias:
            return f"it has no kernel for {problem.label} as a whole"
        if problem.conv.dims == 1:
            return "one dimension is served as images of height 1"
        if problem.conv.fails_in_channels_last(problem.shape[-1]):
            return "oneDNN fails on this geometry in channels_last"
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        conv = problem.conv
        geometry = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)

        def pack() -> tuple[Tensor, Tensor, float, float]:
            (weight,), (bias,) = parameters.tensors()
            weight, bias = weight.detach().contiguous(), bias.detach()
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(problem.shape))
            gain = weight.double().abs().flatten(1).sum(1).max().item()
            return packed, bias, gain, bias.double().abs().max().item()

        # One packing serves every input shape: oneDNN reorders where its choice for another shape differs.
        weight, bias, gain, offset = parameters.pack(("onednn", problem.types.source), pack)
        relu, add_inside = problem.epilogue.relu, _adds_inside(problem)
        layout = torch.channels_last if conv.dims == 2 else torch.channels_last_3d
        channels_last = problem.memory_format == layout
        # What rounding adds to results is less than the other half. In float16 bounds of some layers are above its range.
        limit = torch.finfo(problem.types.source).max / 2 if problem.types.source != torch.float16 else -torch.inf
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        binary = torch.ops.mkldnn._convolution_pointwise.binary

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=layout)
            if residual is not None:
                residual = residual.contiguous(memory_format=layout)
            bound = torch.inf
            if bounds.kept() and (residual is None or add_inside):
                bound = gain * bounds.of(x) + offset + (0.0 if residual is None else bounds.of(residual))
                if relu and not bound < limit:
                    bound = gain * bounds.look(x) + offset + (0.0 if residual is None else bounds.look(residual))
            fused = relu and bound < limit
            if residual is not None and add_inside:
                y = binary(x, residual, weight, bias, *geometry, "add", 1.0, "relu" if fused else None, [], "")
            else:
                y = pointwise(x, weight, bias, *geometry, "relu" if fused else "none", [], "")
                if residual is not None:
                    y.add_(residual)
            if bound < limit:
                bounds.tell(y, _ROUNDED * bound)
            if relu and not fused:
                y.relu_()
            return y if channels_last else y.contiguous()

        return kernel


def _adds_inside(problem: Problem) -> bool:
    """Whether a residual is added by the primitive, as a post-op, and not by a pass after it.

    In bfloat16 that saves a fifth of a 1×1 layer's time, and a rounding. In float32 the pass was measured to be level, and a
    fifth faster for the largest results. The post-op isn't served for grouped convolutions, nor by PyTorch 2.11 where the
    result has one channel or one pixel, whose strides don't tell channels_last from contiguous.
    """
    _, channels, *size = problem.output_shape()
    return problem.types.source != torch.float32 and problem.conv.groups == 1 and channels > 1 and math.prod(size) > 1
