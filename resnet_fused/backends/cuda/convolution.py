"""Implicit-GEMM convolution with bias, residual and activation fused, for tensor cores; csrc/cuda/conv2d.cuh.

Which kernel a problem gets, and how it is launched, is planned in csrc/cuda/conv2d_plan.cpp, which keeps the plans. The
operators ask it at every launch, and the tests ask it as well.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cuda import device
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Kind, Problem
from resnet_fused.backends.tf32 import to_tf32

_FLOAT16, _BFLOAT16, _FLOAT32, _TF32 = range(4)  # ElementType in csrc/cuda/element_type.h
ELEMENTS = {torch.float16: _FLOAT16, torch.bfloat16: _BFLOAT16, torch.float32: _FLOAT32}


def plan_problem(problem: Problem, tf32: bool) -> list[int]:
    """A convolution in the order of csrc/cuda/conv2d_plan.h's Conv2dProblem."""
    conv, (n, c, h, w) = problem.conv, problem.shape
    element = _TF32 if tf32 else ELEMENTS[problem.types.source]
    return [n, h, w, c, conv.out_channels, *conv.geometry, element]


def pack_weight(weight: Tensor, layout: list[int], tf32: bool) -> Tensor:
    """The weight as the kernels read it: (out_channels, filter_rows, runs, run_length), zeros where a run is padded.

    Args:
        weight: (out_channels, in_channels, kh, kw).
        layout: as resnet_fused_cuda::conv2d_weight_layout gives it.
        tf32: round float32 to TF32, to nearest, ties away from zero; the kernels then need not.
    """
    filter_rows, runs, lead, length, padded = layout
    packed = weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], filter_rows, runs, length)
    packed = F.pad(packed, (lead, padded - lead - length)).contiguous()
    if tf32:
        packed = to_tf32(packed)
    return packed


class ImplicitGemm(Implementation):
    """One group, any geometry, for compute capability 7.5 (bfloat16: 8.0) and newer."""

    name = "implicit GEMM"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        conv, capability = problem.conv, device.properties(problem.device)[0]
        if problem.epilogue.pool is not None or not problem.epilogue.bias:
            return f"it has no kernel for {problem.label} as a whole"
        if conv.groups != 1:
            return f"it serves convolutions of one group, not {conv.groups}"
        if problem.dtype == torch.bfloat16 and capability < 80:
            return f"bfloat16 needs compute capability 8.0 or newer, and {problem.device} has {capability / 10}"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        numbers = plan_problem(problem, _tf32(problem)), device.properties(problem.device), [0] * 6, "none", 0.0, "", 0
        try:
            torch.ops.resnet_fused_cuda.conv2d_plan(*numbers)
        except (ValueError, RuntimeError) as error:  # the planner's reason
            return str(error).splitlines()[0]
        return None

    def plans(self, problem: Problem) -> list[str]:
        numbers = plan_problem(problem, _tf32(problem))
        return torch.ops.resnet_fused_cuda.conv2d_kernels(numbers, device.properties(problem.device))

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        float32, geometry = problem.dtype == torch.float32, problem.conv.geometry
        activation, slope = problem.epilogue.activation.value, problem.epilogue.slope
        bias = parameters.pack(("cuda", "bias"), lambda: parameters.biases[0].detach().float().contiguous().clone())
        wanted = plan or ""
        run = torch.ops.resnet_fused_cuda.conv2d_fwd.default

        @functools.cache
        def weight(tf32: bool) -> Tensor:
            layout = torch.ops.resnet_fused_cuda.conv2d_weight_layout(plan_problem(problem, tf32))
            key = ("cuda", problem.dtype, tf32, *layout)
            return parameters.pack(key, lambda: pack_weight(parameters.weights[0], layout, tf32))

        if not float32:
            packed = weight(False)
            given = geometry, activation, slope, False, wanted, 0
            return in_its_format(lambda x, residual: run(x, packed, bias, residual, *given), problem)

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            tf32 = _tf32(problem)  # may change from call to call
            # A plan is of one kind of arithmetic; when the other is asked for, the planner chooses.
            named = wanted if ("tf32" in wanted) == tf32 else ""
            return run(x, weight(tf32), bias, residual, geometry, activation, slope, tf32, named, 0)

        return in_its_format(kernel, problem)


def _tf32(problem: Problem) -> bool:
    return problem.tf32_allowed() and device.properties(problem.device)[0] >= 80
