"""relu(x + residual) and its gradient, one pass each; csrc/cuda/batch_norm.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cuda.device import aligned
from resnet_fused.backends.problem import Activation, Epilogue, Kind, Pointwise, Problem

_ADD_RELU = Epilogue(residual=True, activation=Activation.RELU)


class AddReLU(Implementation):
    """The sum with ReLU, and the gradient of ReLU by its result."""

    name = "add_relu"
    kinds = frozenset({Kind.ELEMENTWISE})

    def why_not(self, problem: Problem) -> str | None:
        gradient = problem.steps[0].operation is Pointwise.RELU_GRADIENT
        return None if gradient or problem.epilogue == _ADD_RELU else f"it has no kernel for {problem.label}"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        ops, format = torch.ops.resnet_fused_cuda, problem.memory_format
        gradient = problem.steps[0].operation is Pointwise.RELU_GRADIENT
        run = ops.add_relu_bwd.default if gradient else ops.add_relu_fwd.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            return run(aligned(x.contiguous(memory_format=format)), aligned(residual.contiguous(memory_format=format)))

        return kernel
