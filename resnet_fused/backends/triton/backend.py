"""The Triton backend: what it serves. Preparing and launching is in prepare.py, which imports triton.

Under torch.compile these kernels stay inside of the opaque ops that resnet_fused registers with torch.library. Opaque
was preferred to triton_op and wrap_triton because the choice of backend, tile and packed weights happens when an op is
first run on real tensors, which tracing doesn't have; an op is one node of the graph (fullgraph holds), launches on the
current stream without synchronising, and is captured by CUDA graphs as it is. What Inductor can't do is fuse its own
pointwise kernels into ours, and there are none left: bias, residual and activation are in the epilogue already.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from resnet_fused import config
from resnet_fused.backends import Activation, Backend, ConvParameters, Epilogue, Implementation, Kernel
from resnet_fused.backends.batch_norm import BatchNormPasses
from resnet_fused.backends.problem import Kind, Pointwise, Problem

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ADD_RELU = Epilogue(residual=True, activation=Activation.RELU)


def _why_not_whole(problem: Problem) -> str | None:
    served = problem.epilogue.pool is None and problem.epilogue.bias
    return None if served else f"it has no kernel for {problem.label} as a whole"


class Depthwise(Implementation):
    """A channel at a time, without matrix units; conv2d_depthwise.py."""

    name = "depthwise"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        from resnet_fused.backends.triton import conv2d_depthwise

        return _why_not_whole(problem) or conv2d_depthwise.why_not(problem)

    def plans(self, problem: Problem) -> list[str]:
        from resnet_fused.backends.triton import prepare

        return prepare.depthwise_plans(problem)

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        from resnet_fused.backends.triton import prepare

        return prepare.convolution(problem, parameters, plan, prepare.Depthwise)


class Grouped(Implementation):
    """Several groups as one block of a matrix unit's size; conv2d_grouped.py."""

    name = "grouped"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        from resnet_fused.backends.triton import prepare

        return _why_not_whole(problem) or prepare.why_not_grouped(problem)

    def plans(self, problem: Problem) -> list[str]:
        from resnet_fused.backends.triton import prepare

        return prepare.grouped_plans(problem)

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        from resnet_fused.backends.triton import prepare

        return prepare.convolution(problem, parameters, plan, prepare.Grouped)


class Convolution(Implementation):
    """Implicit GEMM, grouped too; conv2d.py, conv2d_pairs.py, and the tiles of configs.py."""

    name = "implicit GEMM"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        return _why_not_whole(problem)

    def plans(self, problem: Problem) -> list[str]:
        from resnet_fused.backends.triton import prepare

        return prepare.plans(problem)

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        from resnet_fused.backends.triton import prepare

        return prepare.convolution(problem, parameters, plan)


class AddReLU(Implementation):
    """The sum with ReLU, and the gradient of ReLU by its result; elementwise.py."""

    name = "add_relu"
    kinds = frozenset({Kind.ELEMENTWISE})

    def why_not(self, problem: Problem) -> str | None:
        gradient = problem.steps[0].operation is Pointwise.RELU_GRADIENT
        return None if gradient or problem.epilogue == _ADD_RELU else f"it has no kernel for {problem.label}"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        from resnet_fused.backends.triton import prepare

        return prepare.elementwise_kernel(problem)


class BatchNorm(Implementation):
    """Its four passes; bn.py."""

    name = "batch norm"
    kinds = frozenset({Kind.BATCH_NORM})

    def why_not(self, problem: Problem) -> str | None:
        served = problem.epilogue.activation in (Activation.NONE, Activation.RELU)
        return None if served else f"it has no passes for {problem.label}"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> BatchNormPasses:
        from resnet_fused.backends.triton.batch_norm import TritonPasses

        return TritonPasses()


class Triton(Backend):
    """Convolution, elementwise and batch norm kernels in Triton."""

    name = "triton"
    activations = tuple(Activation)
    implementations = (Depthwise(), Grouped(), Convolution(), AddReLU(), BatchNorm())
    asks_for_gpu = True
    ready = False

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

    def why_none(self, problem: Problem) -> str | None:
        device = "cpu" if config.triton_interpreted() else "cuda"
        if problem.device.type != device:
            interpreter = " (TRITON_INTERPRET is set)" if device == "cpu" else ""
            return f"it serves {device} tensors{interpreter}, not {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {problem.types.source}"
        bfloat16_on_cuda = problem.dtype == torch.bfloat16 and device == "cuda" and torch.version.hip is None
        if bfloat16_on_cuda and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "bfloat16 needs compute capability 8.0 or newer"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        return None

    def preferred(self, problem: Problem) -> bool:
        # No kernel here was ever timed on a GPU. A choice that rf.tune recorded is taken before this is asked.
        return False
