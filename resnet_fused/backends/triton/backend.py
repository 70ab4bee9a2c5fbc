"""The Triton backend: what it serves. Preparing and launching is in prepare.py, which imports triton.

Under torch.compile these kernels stay inside of the opaque ops that resnet_fused registers with torch.library. Opaque
was preferred to triton_op and wrap_triton because the choice of backend, tile and packed weights happens when an op is
first run on real tensors, which tracing doesn't have; an op is one node of the graph (fullgraph holds), launches on the
current stream without synchronising, and is captured by CUDA graphs as it is. What Inductor can't do is fuse its own
pointwise kernels into ours, and there are none left: shift, residual and ReLU are in the epilogue already.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from resnet_fused import config
from resnet_fused.backends import Kernel
from resnet_fused.backends.norm import NORM_OPS, NormKernels
from resnet_fused.backends.problem import Folded, Problem

_CONV_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
_OPS = (*_CONV_OPS, *NORM_OPS, "add_relu", "add_relu_backward")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Triton:
    """Convolution, elementwise and batch norm kernels in Triton."""

    name = "triton"
    asks_for_gpu = True

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; `pip install triton`"
        if config.triton_interpreted() or torch.cuda.is_available():
            return None
        return (
            "there is no GPU (torch.cuda.is_available() is False); "
            "TRITON_INTERPRET=1 runs the kernels on CPU tensors in Triton's interpreter, for tests"
        )

    def unsupported(self, problem: Problem) -> str | None:
        device = "cpu" if config.triton_interpreted() else "cuda"
        if problem.device.type != device:
            interpreter = " (TRITON_INTERPRET is set)" if device == "cpu" else ""
            return f"it serves {device} tensors{interpreter}, not {problem.device.type}"
        if problem.op not in _OPS:
            return f"it has no kernel for {problem.op} as a whole"
        if problem.dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {problem.dtype}"
        bfloat16_on_cuda = problem.dtype == torch.bfloat16 and device == "cuda" and torch.version.hip is None
        if bfloat16_on_cuda and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "bfloat16 needs compute capability 8.0 or newer"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        return None

    def wins(self, problem: Problem) -> bool:
        # No kernel here was ever timed on a GPU. A choice that rf.tune recorded is taken before this is asked.
        return False

    def variants(self, problem: Problem) -> list[str]:
        """Names of the plans worth a measurement, which `prepare` takes, most promising first; empty without a choice."""
        from resnet_fused.backends.triton import prepare

        return prepare.variants(problem) if problem.op in _CONV_OPS else []

    def prepare(self, problem: Problem, folded: Folded, variant: str | None = None) -> Kernel:
        """The kernel for the problem, by the plan of that name, or by the most promising one."""
        from resnet_fused.backends.triton import prepare

        return prepare.prepare(problem, folded, variant)

    def norm(self) -> NormKernels:
        """The passes of batch norm in training."""
        from resnet_fused.backends.triton.norm import TritonNorm

        return TritonNorm()
