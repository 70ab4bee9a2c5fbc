"""Our own CUDA C++ kernels: convolution with shift, residual and ReLU fused, add_relu, and batch norm's passes.

Which kernel a problem gets, and how it is launched, is planned in csrc/cuda/conv2d_plan.cpp, which keeps the plans. The
operators ask it at every launch, and the tests ask it as well.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import Kernel, library, records
from resnet_fused.backends.cuda_norm import CUDANorm
from resnet_fused.backends.norm import NORM_OPS
from resnet_fused.backends.problem import Folded, Problem
from resnet_fused.backends.tf32 import to_tf32

_LIBRARY = "resnet_fused_cuda"
_CONV_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
_ELEMENTWISE = ("add_relu", "add_relu_backward")
_FLOAT16, _BFLOAT16, _FLOAT32, _TF32 = range(4)  # ElementType in csrc/cuda/element_type.h
_TYPES = {torch.float16: _FLOAT16, torch.bfloat16: _BFLOAT16, torch.float32: _FLOAT32}


def plan_problem(problem: Problem, tf32: bool) -> list[int]:
    """A convolution in the order of csrc/cuda/conv2d_plan.h's Conv2dProblem."""
    (conv,) = problem.convs
    n, c, h, w = problem.shape
    element = _TF32 if tf32 else _TYPES[problem.dtype]
    geometry = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
    return [n, h, w, c, conv.out_channels, *geometry, element, int(problem.op != "conv2d_bn")]


@functools.cache
def device_properties(device: torch.device) -> list[int]:
    """What plans depend on, in the order of csrc/cuda/plan.h's DeviceProperties: compute capability ×10 first."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.resnet_fused_cuda.device_properties(index)


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


class CUDA:
    """Compiled kernels of csrc/cuda for NVIDIA GPUs of compute capability 7.5 and newer."""

    name = "cuda"
    asks_for_gpu = True

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        reason = library.load(_LIBRARY)
        if reason is not None:
            toolkit = f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda or '13.0'}.*"
            return f"{reason}; nvcc of PyTorch's CUDA must be there before: pip install '{toolkit}'"
        return None if torch.cuda.is_available() else "there is no GPU (torch.cuda.is_available() is False)"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"it serves cuda tensors, not {problem.device.type}"
        if problem.op not in (*_CONV_OPS, *NORM_OPS, *_ELEMENTWISE):
            return f"it has no kernel for {problem.op} as a whole"
        if problem.dtype not in _TYPES:
            return f"it serves float32, float16 and bfloat16, not {problem.dtype}"
        capability = device_properties(problem.device)[0]
        if capability < 75:
            return f"it needs compute capability 7.5 or newer, and {problem.device} has {capability / 10}"
        if problem.op not in _CONV_OPS:
            return None
        return self._unsupported_conv(problem, capability)

    def _unsupported_conv(self, problem: Problem, capability: int) -> str | None:
        (conv,) = problem.convs
        if conv.groups != 1:
            return f"it serves convolutions of one group, not {conv.groups}"
        if problem.dtype == torch.bfloat16 and capability < 80:
            return f"bfloat16 needs compute capability 8.0 or newer, and {problem.device} has {capability / 10}"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        try:
            self._plan(problem)
        except (ValueError, RuntimeError) as error:  # the planner's reason
            return str(error).splitlines()[0]
        return None

    def wins(self, problem: Problem) -> bool:
        # Where no trial was made. On an H200 in half precision a ResNet's stem took 0.11 to 0.28 of the time of stock's ops,
        # and its convolutions without ReLU 0.36 to 0.94 (batch 1 to 256). Where cuDNN has a fused op, that was mostly faster.
        # The passes of batch norm take an H200 less time than stock's, and the host more: a training step of a ResNet-50
        # (batch 128, bfloat16) took 38.8 ms with them and 30.1 without.
        if problem.op not in _CONV_OPS or problem.dtype not in (torch.float16, torch.bfloat16):
            return False
        stem = problem.convs[0].in_channels % 8 != 0
        return (stem or problem.op == "conv2d_bn") and device_properties(problem.device)[0] == 90

    def variants(self, problem: Problem) -> list[str]:
        """Names of the kernels that `prepare` takes, the most promising first; empty where there is no choice."""
        if problem.op not in _CONV_OPS:
            return []
        numbers = plan_problem(problem, self._tf32(problem))
        return torch.ops.resnet_fused_cuda.conv2d_kernels(numbers, device_properties(problem.device))

    def norm(self) -> CUDANorm:
        return CUDANorm()

    def prepare(self, problem: Problem, folded: Folded, variant: str | None = None) -> Kernel:
        """The kernel for the problem: the one of that name, else the recorded one, else the planner's choice."""
        if problem.op in _ELEMENTWISE:
            run = self._add_relu(problem)
        else:
            run = self._conv(problem, folded, variant or records.variant(problem, self.name) or "")
        if problem.memory_format == torch.channels_last:
            return run
        return lambda x, residual: run(x, residual).contiguous()

    def _tf32(self, problem: Problem) -> bool:
        return problem.tf32_allowed() and device_properties(problem.device)[0] >= 80

    def _plan(self, problem: Problem) -> None:
        """Raises RuntimeError with the reason if the planner refuses the problem."""
        arguments = plan_problem(problem, self._tf32(problem)), device_properties(problem.device), [0] * 6, "", 0
        torch.ops.resnet_fused_cuda.conv2d_plan(*arguments)

    def _conv(self, problem: Problem, folded: Folded, variant: str) -> Kernel:
        (conv,) = problem.convs
        geometry = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
        relu, float32 = problem.op != "conv2d_bn", problem.dtype == torch.float32
        shift = folded.pack((self.name, "shift"), lambda: folded.shifts[0].detach().float().contiguous().clone())
        run = torch.ops.resnet_fused_cuda.conv2d_fwd.default

        @functools.cache
        def weight(tf32: bool) -> Tensor:
            layout = torch.ops.resnet_fused_cuda.conv2d_weight_layout(plan_problem(problem, tf32))
            key = (self.name, problem.dtype, tf32, *layout)
            return folded.pack(key, lambda: pack_weight(folded.weights[0], layout, tf32))

        if not float32:
            packed = weight(False)
            return lambda x, residual: run(x, packed, shift, residual, geometry, relu, False, variant, 0)

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            tf32 = self._tf32(problem)  # may change from call to call
            # A variant is of one kind of arithmetic; when the other is asked for, the planner chooses.
            named = variant if ("tf32" in variant) == tf32 else ""
            return run(x, weight(tf32), shift, residual, geometry, relu, tf32, named, 0)

        return kernel

    def _add_relu(self, problem: Problem) -> Kernel:
        ops, format = torch.ops.resnet_fused_cuda, problem.memory_format
        run = ops.add_relu_fwd.default if problem.op == "add_relu" else ops.add_relu_bwd.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            x, residual = (aligned(t.contiguous(memory_format=format)) for t in (x, residual))
            return run(x, residual)

        return kernel


def aligned(t: Tensor) -> Tensor:
    """t, or a copy if its first element is not at a multiple of 16 bytes (a view into another tensor)."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
