"""Our own CPU kernels: Winograd and direct convolutions for AVX-512 and AVX2, with bias, residual and ReLU fused."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.backends import Backend, library
from resnet_fused.backends.cpu import plan
from resnet_fused.backends.cpu.batch_norm import BatchNorm
from resnet_fused.backends.cpu.block import WholeBlock
from resnet_fused.backends.cpu.convolution import Direct, Winograd
from resnet_fused.backends.cpu.elementwise import OnePass
from resnet_fused.backends.cpu.frozen import FAKES
from resnet_fused.backends.cpu.grouped import Depthwise, Grouped
from resnet_fused.backends.cpu.head import AveragePool, Classifier
from resnet_fused.backends.cpu.stem import Stem
from resnet_fused.backends.cpu.training_conv import TrainingConvolution
from resnet_fused.backends.freezing import checked_input, register_fakes
from resnet_fused.backends.problem import Activation, Kind, Problem
from resnet_fused.backends.processor import processor

_LIBRARY = "resnet_fused_cpu"
_INSTRUCTION_SETS = ("scalar", "AVX2", "AVX-512")  # Isa in csrc/cpu/isa.h
_SCALAR = 0


class CPU(Backend):
    """Compiled kernels of csrc/cpu for CPU tensors."""

    name = "cpu"
    freezes = True
    # Stock's GELU by the error function is NaN at infinity in float32 with AVX-512, and infinity in float64.
    activations = tuple(function for function in Activation if function is not Activation.GELU)
    implementations = (
        WholeBlock(),
        Stem(),
        Depthwise(),
        Grouped(),
        Winograd(),
        Direct(),
        Classifier(),
        AveragePool(),
        OnePass(),
        BatchNorm(),
        TrainingConvolution(),
    )

    def frozen_input(self, x: Tensor, example: Tensor) -> Tensor:
        return checked_input(_LIBRARY, x, example)

    def details(self) -> str:
        ops = torch.ops.resnet_fused_cpu
        built = ", ".join(_INSTRUCTION_SETS[number] for number in ops.instruction_sets())
        bfloat16 = " with AVX512_BF16" if ops.avx512_bf16() else ""
        text = f"built for {built}; in use: {_INSTRUCTION_SETS[ops.isa()]}{bfloat16}"
        if not plan.fitted():
            text += f"; first choices fitted on {plan.FITTED_ON} with AVX-512: rf.tune may find better ones"
        return text

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        reason = library.load(_LIBRARY)
        if reason is None:
            register_fakes(_LIBRARY, FAKES)
        if reason is None and torch.ops.resnet_fused_cpu.isa() == _SCALAR:
            return "this CPU has neither AVX-512 nor AVX2 with FMA; use the backend 'onednn'"
        return reason

    def why_none(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it serves CPU tensors, not {problem.device.type}"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it serves float32, bfloat16 and float16, not {problem.types.source}"
        if problem.dtype == torch.float16:
            if problem.kind in (Kind.BATCH_NORM, Kind.TRAINING_CONV):
                return "it trains in float32 and bfloat16, not in float16"
            if not torch.ops.resnet_fused_cpu.float16():
                return "this CPU can't convert float16 (F16C is needed)"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        return None

    def preferred(self, problem: Problem) -> bool:
        kind = problem.kind
        # Where the CPU multiplies float16 itself, stock wasn't measured; elsewhere it emulates that, at many times our time.
        if problem.dtype == torch.float16 and processor().multiplies("float16"):
            return False
        if kind in (Kind.BATCH_NORM, Kind.AVERAGE_POOL, Kind.TRAINING_CONV, Kind.ELEMENTWISE, Kind.AFFINE):
            return True
        # oneDNN uses AMX, at many times the rate of our instructions.
        if problem.dtype == torch.bfloat16 and torch.ops.resnet_fused_cpu.amx_bf16():
            return False
        if kind is Kind.CONVOLUTION:
            return plan.conv_preferred(problem)
        # Without Winograd we are level with oneDNN at best.
        if problem.precision != "fast":
            return False
        return kind is Kind.LINEAR or plan.block_preferred(problem)
