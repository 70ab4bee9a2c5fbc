"""oneDNN on CPUs: one primitive a convolution, with bias, residual and activation as post-ops and weights packed once.

oneDNN's ReLU is max(y, 0) by an instruction that turns NaN into 0, where stock PyTorch keeps NaN. Its ReLU6, sigmoid and
hardsigmoid lose NaN on some CPUs, too. So these are used only where no NaN can arise: the result is bounded by
‖w‖₁·max|x| + max|bias| + max|residual|, and if that is far from the largest number, no sum overflows. Within one call of a
program the bound of a result is that of the next layer's input (backends/bounds.py), so that only the first input, and now and
then one in the middle, is looked at. Elsewhere the function is a pass of its own, in place, which was measured to cost less
than a look at all of x.

The other functions multiply by the value, and keep NaN and infinities on all x86 CPUs, from SSE 4.1 to AVX-512. On other CPUs,
whose kernels aren't oneDNN's own, nobody looked.
"""

from __future__ import annotations

import math
import platform

import torch
from torch import Tensor

from resnet_fused.backends import Activation, ConvParameters, Implementation, Kernel, bounds
from resnet_fused.backends.activation import activated
from resnet_fused.backends.problem import Epilogue, Kind, Problem

# More than a result grows by rounding to bfloat16.
_ROUNDED = 1.01

# The functions as post-ops: their names, parameters and algorithms as TorchInductor passes them.
_PostOp = tuple[str, list[float], str]
_NOTHING: _PostOp = ("none", [], "")
_POST_OPS: dict[Activation, _PostOp] = {
    Activation.RELU: ("relu", [], ""),
    Activation.RELU6: ("hardtanh", [0.0, 6.0], ""),
    Activation.SIGMOID: ("sigmoid", [], ""),
    Activation.SILU: ("swish", [], ""),
    Activation.HARDSIGMOID: ("hardsigmoid", [], ""),
    Activation.HARDSWISH: ("hardswish", [], ""),
    Activation.GELU: ("gelu", [], "none"),
    Activation.GELU_TANH: ("gelu", [], "tanh"),
}
_LOSE_NAN = {Activation.RELU, Activation.RELU6, Activation.SIGMOID, Activation.HARDSIGMOID}
_LARGEST_RESULT = {Activation.RELU6: 6.0, Activation.SIGMOID: 1.0, Activation.HARDSIGMOID: 1.0}


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
        epilogue, add_inside = problem.epilogue, _adds_inside(problem)
        function, post_op = epilogue.activation, _post_op(epilogue)
        # The primitive that adds a residual has no function but ReLU.
        fusible = function is not Activation.NONE and (not epilogue.residual or (add_inside and epilogue.relu))
        loses_nan = function in _LOSE_NAN or platform.machine() not in ("x86_64", "AMD64")
        layout = torch.channels_last if conv.dims == 2 else torch.channels_last_3d
        channels_last = problem.memory_format == layout
        # What rounding adds to results is less than the other half. In float16 bounds of some layers are above its range, and
        # stock makes an infinity of a result beyond it before it takes the function.
        float16 = problem.types.source == torch.float16
        limit = torch.finfo(problem.types.source).max / 2 if not float16 else -torch.inf
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        binary = torch.ops.mkldnn._convolution_pointwise.binary

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=layout)
            if residual is not None:
                residual = residual.contiguous(memory_format=layout)
            bound = torch.inf
            if bounds.kept() and (residual is None or add_inside):
                bound = gain * bounds.of(x) + offset + (0.0 if residual is None else bounds.of(residual))
                if fusible and loses_nan and not bound < limit:
                    bound = gain * bounds.look(x) + offset + (0.0 if residual is None else bounds.look(residual))
            fused = fusible and not float16 and (bound < limit or not loses_nan)
            if residual is not None and add_inside:
                y = binary(x, residual, weight, bias, *geometry, "add", 1.0, "relu" if fused else None, [], "")
            else:
                y = pointwise(x, weight, bias, *geometry, *(post_op if fused else _NOTHING))
                if residual is not None:
                    y.add_(residual)
            if not fused:
                y = activated(y, epilogue, inplace=True)
            if bound < limit:
                bounds.tell(y, _ROUNDED * _bound(epilogue, bound))
            return y if channels_last else y.contiguous()

        return kernel


def _post_op(epilogue: Epilogue) -> _PostOp:
    if epilogue.activation is Activation.LEAKY_RELU:
        return "leaky_relu", [epilogue.slope], ""
    return _POST_OPS.get(epilogue.activation, _NOTHING)


def _bound(epilogue: Epilogue, bound: float) -> float:
    """A bound of the function's results for values of up to `bound`."""
    if epilogue.activation is Activation.LEAKY_RELU:
        return max(1.0, abs(epilogue.slope)) * bound
    return _LARGEST_RESULT.get(epilogue.activation, bound)


def _adds_inside(problem: Problem) -> bool:
    """Whether a residual is added by the primitive, as a post-op, and not by a pass after it.

    In bfloat16 that saves a fifth of a 1×1 layer's time, and a rounding. In float32 the pass was measured to be level, and a
    fifth faster for the largest results. The post-op isn't served for grouped convolutions, nor by PyTorch 2.11 where the
    result has one channel or one pixel, whose strides don't tell channels_last from contiguous.
    """
    _, channels, *size = problem.output_shape()
    return problem.types.source != torch.float32 and problem.conv.groups == 1 and channels > 1 and math.prod(size) > 1
