"""oneDNN on CPUs: one primitive a convolution.

The primitives are reached through the operators that TorchInductor itself uses, `mkldnn::_convolution_pointwise` and its
`.binary` overload. They are private to PyTorch, so they are looked up at run time, and the backend is unavailable without them.
"""

from __future__ import annotations

import functools
import math

import torch

from resnet_fused.backends import Backend
from resnet_fused.backends.onednn.convolution import PointwiseConvolution
from resnet_fused.backends.problem import Activation, Problem


@functools.cache
def _float16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def _bfloat16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class OneDNN(Backend):
    """oneDNN convolution primitives with fused post-ops, for CPU tensors."""

    name = "onednn"
    activations = tuple(Activation)
    implementations = (PointwiseConvolution(),)
    keeps_bounds = True

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

    def why_none(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it serves CPU tensors, not {problem.device.type}"
        if not torch.backends.mkldnn.enabled:
            return "torch.backends.mkldnn.enabled is False"
        if problem.dtype == torch.bfloat16 and not _bfloat16_supported():
            return "this CPU has no bfloat16 arithmetic for oneDNN (AVX-512 is needed)"
        if problem.dtype == torch.float16 and not _float16_supported():
            return "this CPU has no float16 arithmetic for oneDNN (AVX-512 FP16 is needed)"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it serves float32, bfloat16 and float16, not {problem.types.source}"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        return None

    def preferred(self, problem: Problem) -> bool:
        # float16 was never measured: no CPU at hand has the instructions.
        return problem.dtype != torch.float16 and not _stock_is_faster(problem)


def _stock_is_faster(problem: Problem) -> bool:
    """Whether stock PyTorch computes the problem without oneDNN, which it does for one small image, and sooner."""
    conv = problem.conv
    if conv.dims != 2:
        return False
    n, c, h, w = problem.shape
    if problem.dtype != torch.float32 or n > 1 or conv.groups > 1 or min(conv.kernel) > 3 or c * h * w > 20480:
        return False
    # Below a million products what was measured to count is how long a call takes at all: 23 µs, and stock's 6.
    return math.prod((c, *conv.kernel, *problem.output_shape())) < 800_000
