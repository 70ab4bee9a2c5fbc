"""oneDNN on CPUs: one primitive a convolution, with shift, residual and ReLU as post-ops and weights packed once.

The primitives are reached through the operators that TorchInductor itself uses, `mkldnn::_convolution_pointwise` and its
`.binary` overload. They are private to PyTorch, so they are looked up at run time, and the backend is unavailable without them.

oneDNN's ReLU is max(y, 0) by an instruction that turns NaN into 0, where stock PyTorch keeps NaN. So it is used only where no
NaN can arise: the result is bounded by ‖w‖₁·max|x| + max|shift| + max|residual|, and if that is far from the largest number,
no sum overflows. Within one call of a program the bound of a result is that of the next layer's input (backends/bounds.py), so
that only the first input, and now and then one in the middle, is looked at. Elsewhere ReLU is a pass of its own, in place,
which was measured to cost less than a look at all of x.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from resnet_fused.backends import Kernel, bounds
from resnet_fused.backends.problem import Folded, Problem

_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
# More than a result grows by rounding to bfloat16.
_ROUNDED = 1.01


@functools.cache
def _float16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def _bfloat16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class OneDNN:
    """oneDNN convolution primitives with fused post-ops, for CPU tensors."""

    name = "onednn"

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return (
                "this PyTorch was built without oneDNN (torch.backends.mkldnn.is_available() is False); install a build with it"
            )
        pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
        if pointwise is None or "binary" not in pointwise.overloads():
            return f"PyTorch {torch.__version__} has no mkldnn::_convolution_pointwise; use torch>=2.10"
        if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
            return f"PyTorch {torch.__version__} has no mkldnn::_reorder_convolution_weight; use torch>=2.10"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it serves CPU tensors, not {problem.device.type}"
        if problem.op not in _OPS:
            return f"it has no kernel for {problem.op} as a whole"
        if not torch.backends.mkldnn.enabled:
            return "torch.backends.mkldnn.enabled is False"
        if problem.dtype == torch.bfloat16 and not _bfloat16_supported():
            return "this CPU has no bfloat16 arithmetic for oneDNN (AVX-512 is needed)"
        if problem.dtype == torch.float16 and not _float16_supported():
            return "this CPU has no float16 arithmetic for oneDNN (AVX-512 FP16 is needed)"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it serves float32, bfloat16 and float16, not {problem.dtype}"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        if problem.convs[0].fails_in_channels_last(problem.shape[3]):
            return "oneDNN fails on this geometry in channels_last"
        return None

    def wins(self, problem: Problem) -> bool:
        # float16 was never measured: no CPU at hand has the instructions.
        return problem.dtype != torch.float16 and not _stock_is_faster(problem)

    def prepare(self, problem: Problem, folded: Folded) -> Kernel:
        (conv,) = problem.convs
        geometry = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)

        def pack() -> tuple[Tensor, Tensor, float, float]:
            (weight,), (shift,) = folded.tensors()
            weight, shift = weight.detach().contiguous(), shift.detach()
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(problem.shape))
            gain = weight.double().abs().sum((1, 2, 3)).max().item()
            return packed, shift, gain, shift.double().abs().max().item()

        # One packing serves every input shape: oneDNN reorders where its choice for another shape differs.
        weight, shift, gain, offset = folded.pack((self.name, problem.dtype), pack)
        relu, add_inside = problem.op != "conv2d_bn", _adds_inside(problem)
        channels_last = problem.memory_format == torch.channels_last
        # What rounding adds to results is less than the other half. In float16 bounds of some layers are above its range.
        limit = torch.finfo(problem.dtype).max / 2 if problem.dtype != torch.float16 else -torch.inf
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        binary = torch.ops.mkldnn._convolution_pointwise.binary

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            bound = torch.inf
            if bounds.kept() and (residual is None or add_inside):
                bound = gain * bounds.of(x) + offset + (0.0 if residual is None else bounds.of(residual))
                if relu and not bound < limit:
                    bound = gain * bounds.look(x) + offset + (0.0 if residual is None else bounds.look(residual))
            fused = relu and bound < limit
            if residual is not None and add_inside:
                y = binary(x, residual, weight, shift, *geometry, "add", 1.0, "relu" if fused else None, [], "")
            else:
                y = pointwise(x, weight, shift, *geometry, "relu" if fused else "none", [], "")
                if residual is not None:
                    y.add_(residual)
            if bound < limit:
                bounds.tell(y, _ROUNDED * bound)
            if relu and not fused:
                y.relu_()
            return y if channels_last else y.contiguous()

        return kernel


def _stock_is_faster(problem: Problem) -> bool:
    """Whether stock PyTorch computes the problem without oneDNN, which it does for one small image, and sooner."""
    (conv,) = problem.convs
    n, c, h, w = problem.shape
    if problem.dtype != torch.float32 or n > 1 or conv.groups > 1 or min(conv.kernel) > 3 or c * h * w > 20480:
        return False
    # Below a million products what was measured to count is how long a call takes at all: 23 µs, and stock's 6.
    return math.prod((c, *conv.kernel, *problem.output_shape())) < 800_000


def _adds_inside(problem: Problem) -> bool:
    """Whether a residual is added by the primitive, as a post-op, and not by a pass behind it.

    In bfloat16 that saves a fifth of a 1×1 layer's time, and a rounding. In float32 the pass was measured to be level, and a
    fifth faster for the largest results. The post-op isn't served for grouped convolutions, nor by PyTorch 2.11 where the
    result has one channel or one pixel, whose strides don't tell channels_last from contiguous.
    """
    _, channels, height, width = problem.output_shape()
    return problem.dtype != torch.float32 and problem.convs[0].groups == 1 and channels > 1 and height * width > 1
