"""oneDNN on CPUs: one primitive a convolution, with shift, residual and ReLU as post-ops and weights packed once.

The primitives are reached through the operators that TorchInductor itself uses, `mkldnn::_convolution_pointwise` and its
`.binary` overload. They are private to PyTorch, so they are looked up at run time, and the backend is unavailable without them.

oneDNN's ReLU is max(y, 0) by an instruction that turns NaN into 0, where stock PyTorch keeps NaN. A fused ReLU is therefore
used only where a NaN is impossible: the result is bounded by ‖w‖₁·max|x| + max|shift| + max|residual|, and if that is finite
then no intermediate sum can overflow, and no NaN arise. The bound of a result travels with it, so that in a chain of ops
only the first input, and now and then one in the middle, is looked at. Without such a proof ReLU is a pass of its own.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from resnet_fused.backends import Kernel
from resnet_fused.backends.problem import Folded, Problem

# Half the range is left for the rounding of the bound itself.
_LIMIT = torch.finfo(torch.bfloat16).max / 2
_BOUND = "_resnet_fused_bound"

_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")


@functools.cache
def _float16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def _bfloat16_supported() -> bool:
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def largest(x: Tensor) -> float:
    """max|x| of a channels_last tensor by looking at every element; NaN if there is one. Left on x for `known_bound`."""
    # Flat, because the reduction over a permuted tensor was measured to take 20 times as long.
    low, high = torch.aminmax(x.detach().permute(0, 2, 3, 1).reshape(-1))
    value = max(abs(low.item()), abs(high.item())) if low == low else math.nan
    _remember(x, value)
    return value


def known_bound(x: Tensor) -> float:
    """An upper bound of max|x| that an earlier op left on x, or infinity. A change in place makes it forgotten."""
    bound = getattr(x, _BOUND, None)
    if bound is not None and not x.is_inference() and bound[1] == x._version:
        return bound[0]
    return math.inf


def _remember(x: Tensor, bound: float) -> None:
    # Inference tensors don't count their changes in place, so nothing can be known about them later.
    if not x.is_inference():
        setattr(x, _BOUND, (bound, x._version))


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
        if problem.op == "conv2d_bn_add_relu" and problem.convs[0].groups > 1 and problem.dtype != torch.float32:
            return f"its grouped convolutions add a residual in float32 only, not in {problem.dtype}"
        if 0 in problem.output_shape():
            return "the result is empty"
        return None

    def wins(self, problem: Problem) -> bool:
        # float16 was never measured: no CPU at hand has the instructions.
        return problem.dtype != torch.float16

    def prepare(self, problem: Problem, folded: Folded) -> Kernel:
        (conv,) = problem.convs
        geometry = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
        shift = folded.shifts[0]

        def pack() -> tuple[Tensor, float, float]:
            weight = folded.weights[0].detach()
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(), geometry[0], geometry[1], geometry[2], geometry[3], list(problem.shape)
            )
            gain = weight.double().abs().sum(dim=(1, 2, 3)).max().item()
            return packed, gain, shift.detach().double().abs().max().item()

        # One packing serves every input shape: oneDNN reorders where its choice for another shape differs.
        weight, gain, offset = folded.pack((self.name, problem.dtype), pack)
        add, relu = problem.op == "conv2d_bn_add_relu", problem.op != "conv2d_bn"
        # float16 overflows at 65504, far below the bounds that chains of layers reach.
        provable = problem.dtype != torch.float16
        channels_last = problem.memory_format == torch.channels_last
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        binary = torch.ops.mkldnn._convolution_pointwise.binary

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            bound = gain * known_bound(x) + offset + (known_bound(residual) if residual is not None else 0.0)
            if relu and provable and not bound < _LIMIT:
                bound = gain * largest(x) + offset + (largest(residual) if residual is not None else 0.0)
            fused_relu = relu and provable and bound < _LIMIT
            if add:
                unary = "relu" if fused_relu else None
                y = binary(x, residual, weight, shift, *geometry, "add", 1.0, unary, [], "")
            else:
                y = pointwise(x, weight, shift, *geometry, "relu" if fused_relu else "none", [], "")
            if relu and not fused_relu:
                y.relu_()
            elif bound < _LIMIT:
                _remember(y, bound)
            return y

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            if torch.is_inference_mode_enabled():
                # Results are made as normal tensors, whose changes in place are counted, so that bounds can travel.
                with torch.inference_mode(False), torch.no_grad():
                    y = run(x, residual)
            else:
                y = run(x, residual)
            return y if channels_last else y.contiguous()

        return kernel
