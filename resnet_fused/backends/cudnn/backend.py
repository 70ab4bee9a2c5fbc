"""cuDNN's convolutions, and what follows them: fused by cuDNN, or in one pass of ours over the result.

PyTorch's "cudnn_convolution_relu" and its like are private to it. Two limits hold for all:

* A residual that is the input itself failed before cuDNN 8.3 (pytorch/pytorch issue 62926).
* TF32 follows torch.backends.cudnn, and nothing else, so precision="direct" is served only where that forbids it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from resnet_fused.backends import Backend
from resnet_fused.backends.cudnn import convolution
from resnet_fused.backends.cudnn.convolution import Fused, Plain, WithPass
from resnet_fused.backends.problem import Activation, Problem

_OLDEST_CUDNN = 8300
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CuDNN(Backend):
    """cuDNN's convolutions with fused operations, or with one pass after them, for CUDA tensors."""

    name = "cudnn"
    activations = tuple(Activation)
    implementations = (Plain(), Fused(), WithPass())
    asks_for_gpu = True

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no GPU (torch.cuda.is_available() is False)"
        if torch.version.hip is not None:
            return "this PyTorch was built for AMD GPUs, which have no cuDNN"
        if not torch.backends.cudnn.is_available():
            return "this PyTorch was built without cuDNN; install a build with it"
        version = torch.backends.cudnn.version() or 0
        if version < _OLDEST_CUDNN:
            return f"cuDNN {version} fails for a residual that is the input; install 8.3 or newer"
        return None

    def why_none(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"it serves cuda tensors, not {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {problem.types.source}"
        return "the input or the result is empty" if 0 in (*problem.shape, *problem.output_shape()) else None

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is not None:
            return reason
        if not torch.backends.cudnn.enabled:
            return "torch.backends.cudnn.enabled is False"
        if problem.precision != "fast" and replace(problem, precision="fast").tf32_allowed():
            return "precision is 'direct', and torch.backends.cudnn.conv.fp32_precision is 'tf32'; set it to 'ieee'"
        n, c, h, w = problem.shape
        if max(n * c * h * w, torch.Size(problem.output_shape()).numel()) >= 2**31:
            return "a tensor has 2^31 elements or more, and cuDNN's fused convolution indexes by 32 bits"
        if torch.cuda.is_current_stream_capturing():
            return "the stream is being captured, and a problem must be tried before; run it once without capture"
        return None

    def preferred(self, problem: Problem) -> bool:
        # Where no trial was made. On an H200 in half precision each layer of a ResNet-50, without the stem, took 0.20 to 0.85
        # of the time of stock's ops (batch 1, 32 and 256).
        if not problem.epilogue.bias:
            return True  # it is stock's convolution, with the engine that was found
        if not problem.epilogue.relu:
            return False  # a pass, as stock's bias
        # A pass is one turn where stock takes two.
        return convolution.fusing_was_faster(problem) or convolution.why_no_pass(problem) is None
