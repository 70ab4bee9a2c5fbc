"""Our own CPU kernels: Winograd and direct convolutions for AVX-512 and AVX2, with shift, residual and ReLU fused."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.backends import cpu_bn, cpu_plan, library
from resnet_fused.backends.norm import NORM_OPS, NormKernels
from resnet_fused.backends.problem import Conv, Folded, Problem

_LIBRARY = "resnet_fused_cpu"
_CONVS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
_BLOCKS = ("basic_block", "bottleneck")


def _winograd(problem: Problem, conv: Conv) -> bool:
    return problem.precision == "fast" and cpu_plan.winograd_serves(conv)


def _padded_shift(shift: Tensor) -> Tensor:
    """The shift as the kernels read it: float32, with zeros up to whole panels."""
    panel = torch.ops.resnet_fused_cpu.panel()
    padded = shift.new_zeros(-(-shift.numel() // panel) * panel, dtype=torch.float32)
    padded[: shift.numel()] = shift.detach()
    return padded


def _packed(folded: Folded, index: int) -> tuple[Tensor, Tensor]:
    """Packed weights and padded shift of one convolution, made once for all problems that use it."""

    def pack() -> tuple[Tensor, Tensor]:
        weight = torch.ops.resnet_fused_cpu.pack(folded.weights[index].detach().contiguous())
        return weight, _padded_shift(folded.shifts[index])

    return folded.pack(("cpu", index), pack)


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
        if problem.op not in _CONVS + _BLOCKS:
            return f"it has no kernel for {problem.op}"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32 and bfloat16, not {problem.dtype}"
        if 0 in problem.output_shape():
            return "the result is empty"
        for conv in problem.convs:
            if conv.groups != 1:
                return f"it serves convolutions of one group, not {conv.groups}"
            if problem.dtype == torch.bfloat16 and not _winograd(problem, conv):
                return "in bfloat16 it serves 3×3 convolutions of stride, padding and dilation 1 (by float32 Winograd)"
        if problem.op in _BLOCKS:
            if not cpu_plan.block_serves(problem):
                return "as a whole it serves blocks of stride 1 whose 3×3 layers have padding and dilation 1"
            if problem.precision == "exact":
                return "as a whole it serves blocks by Winograd only, which precision='exact' forbids"
            if problem.dtype != torch.float32:
                return "as a whole it serves blocks in float32"
        return None

    def wins(self, problem: Problem) -> bool:
        if problem.op in _BLOCKS:
            return cpu_plan.block_wins(problem)
        return all(_winograd(problem, conv) for conv in problem.convs)

    def prepare(self, problem: Problem, folded: Folded):  # noqa: ANN201 — the closures below
        run = self._block(problem, folded) if problem.op in _BLOCKS else self._conv(problem, folded)
        if problem.memory_format == torch.channels_last:
            return run
        return lambda x, residual: run(x, residual).contiguous()

    def _conv(self, problem: Problem, folded: Folded):  # noqa: ANN202
        (conv,) = problem.convs
        weight, shift = _packed(folded, 0)
        geometry = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
        plan = [*map(int, cpu_plan.winograd(problem))] if _winograd(problem, conv) else []
        relu, out_channels = problem.op != "conv2d_bn", conv.out_channels
        run = torch.ops.resnet_fused_cpu.conv.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            return run(x, weight, shift, residual, out_channels, geometry, relu, plan)

        return kernel

    def _block(self, problem: Problem, folded: Folded):  # noqa: ANN202
        # The parts' own Folded, under the key by which a block composed of its layers finds them.
        parts = [
            folded.pack(("part", i), lambda i=i: Folded((folded.weights[i],), (folded.shifts[i],)))
            for i in range(len(problem.convs))
        ]
        packed = [_packed(part, 0) for part in parts]
        weights, shifts = [weight for weight, _ in packed], [shift for _, shift in packed]
        channels = [problem.shape[1], *(conv.out_channels for conv in problem.main_path)]
        plan = [*cpu_plan.block(problem)]
        run = torch.ops.resnet_fused_cpu.block.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            return run(x.contiguous(memory_format=torch.channels_last), weights, shifts, channels, plan)

        return kernel

    def norm(self) -> NormKernels:
        return cpu_bn.CPUNorm()
