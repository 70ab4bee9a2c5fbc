"""Our own CPU kernels: Winograd and direct convolutions for AVX-512 and AVX2, with shift, residual and ReLU fused."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.backends import cpu_bn, cpu_plan, library
from resnet_fused.backends.norm import NORM_OPS, NormKernels
from resnet_fused.backends.problem import Conv, Folded, Problem

_LIBRARY = "resnet_fused_cpu"
_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")


def _winograd(problem: Problem, conv: Conv) -> bool:
    return problem.precision == "fast" and cpu_plan.serves(conv)


def _padded_shift(shift: Tensor) -> Tensor:
    """The shift as the kernels read it: float32, with zeros up to whole panels."""
    panel = torch.ops.resnet_fused_cpu.panel()
    padded = shift.new_zeros(-(-shift.numel() // panel) * panel, dtype=torch.float32)
    padded[: shift.numel()] = shift.detach()
    return padded


class CPU:
    """Compiled kernels of csrc/cpu for CPU tensors."""

    name = "cpu"

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        reason = library.load(_LIBRARY)
        if reason is None and torch.ops.resnet_fused_cpu.isa() == 0:
            return "this CPU has neither AVX-512 nor AVX2 with FMA; use the backend 'onednn'"
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it serves CPU tensors, not {problem.device.type}"
        if problem.op in NORM_OPS:
            return cpu_bn.unsupported(problem)
        if problem.op not in _OPS:
            return f"it has no kernel for {problem.op} as a whole"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32 and bfloat16, not {problem.dtype}"
        for conv in problem.convs:
            if conv.groups != 1:
                return f"it serves convolutions of one group, not {conv.groups}"
            if problem.dtype == torch.bfloat16 and not _winograd(problem, conv):
                return "in bfloat16 it serves 3×3 convolutions of stride, padding and dilation 1 (by float32 Winograd)"
        if 0 in problem.output_shape():
            return "the result is empty"
        return None

    def wins(self, problem: Problem) -> bool:
        return all(_winograd(problem, conv) for conv in problem.convs)

    def prepare(self, problem: Problem, folded: Folded):  # noqa: ANN201 — the closure below
        (conv,) = problem.convs

        def pack() -> tuple[Tensor, Tensor]:
            weight = torch.ops.resnet_fused_cpu.pack(folded.weights[0].detach().contiguous())
            return weight, _padded_shift(folded.shifts[0])

        weight, shift = folded.pack((self.name, problem.dtype), pack)
        geometry = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
        plan = [*map(int, cpu_plan.plan(problem))] if _winograd(problem, conv) else []
        relu, out_channels = problem.op != "conv2d_bn", conv.out_channels
        channels_last = problem.memory_format == torch.channels_last
        run = torch.ops.resnet_fused_cpu.conv.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            y = run(x, weight, shift, residual, out_channels, geometry, relu, plan)
            return y if channels_last else y.contiguous()

        return kernel

    def norm(self) -> NormKernels:
        return cpu_bn.CPUNorm()
