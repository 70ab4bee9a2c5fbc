"""Our own CUDA C++ kernels: convolution with bias, residual and activation fused, add_relu, and batch norm's passes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.backends import Backend, library
from resnet_fused.backends.cuda import device
from resnet_fused.backends.cuda.add_relu import AddReLU
from resnet_fused.backends.cuda.batch_norm import BatchNorm
from resnet_fused.backends.cuda.block import Bottleneck
from resnet_fused.backends.cuda.convolution import ELEMENTS, ImplicitGemm
from resnet_fused.backends.cuda.frozen import FAKES
from resnet_fused.backends.cuda.stem import StemWithPool
from resnet_fused.backends.freezing import checked_input, freezing, register_fakes
from resnet_fused.backends.problem import Activation, Kind, Problem

_LIBRARY = "resnet_fused_cuda"
_STEM = StemWithPool()
_ENOUGH_PIXELS = 32 * 56 * 56  # for whole blocks


class CUDA(Backend):
    """Compiled kernels of csrc/cuda for NVIDIA GPUs of compute capability 7.5 and newer."""

    name = "cuda"
    activations = tuple(Activation)
    implementations = (Bottleneck(), _STEM, ImplicitGemm(), AddReLU(), BatchNorm())
    asks_for_gpu = True
    freezes = True

    def frozen_input(self, x: Tensor, example: Tensor) -> Tensor:
        return checked_input(_LIBRARY, x, example)

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA; install one that is built with it"
        reason = library.load(_LIBRARY)
        if reason is not None:
            toolkit = f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda}.*"
            return f"{reason}; nvcc of PyTorch's CUDA must be there before: pip install '{toolkit}'"
        register_fakes(_LIBRARY, FAKES)
        return None if torch.cuda.is_available() else "there is no GPU (torch.cuda.is_available() is False)"

    def why_none(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"it serves cuda tensors, not {problem.device.type}"
        if problem.dtype not in ELEMENTS:
            return f"it serves float32, float16 and bfloat16, not {problem.types.source}"
        if freezing() and problem.kind in (Kind.ELEMENTWISE, Kind.BATCH_NORM):
            return "its passes have no frozen form"
        capability = device.properties(problem.device)[0]
        if capability < 75:
            return f"it needs compute capability 7.5 or newer, and {problem.device} has {capability / 10}"
        if problem.kind is Kind.CONVOLUTION and problem.epilogue.pool is not None:
            return _STEM.why_not(problem)  # nothing else has a pool, so its reason is the backend's
        return None

    def preferred(self, problem: Problem) -> bool:
        # Where no trial was made. On an H200 in half precision a ResNet's stem took 0.11 to 0.28 of the time of stock's ops,
        # and its convolutions without ReLU 0.36 to 0.94 (batch 1 to 256). Where cuDNN has a fused op, that was mostly faster.
        # The passes of batch norm take an H200 less time than stock's, and the host more: a training step of a ResNet-50
        # (batch 128, bfloat16) took 38.8 ms with them and 30.1 without.
        # A stem with its pool as a whole took 0.20 to 0.48 of the time of its parts' fastest kernels, and whole bottlenecks of
        # width 64 0.53 to 0.96 from 32 images of 56² on, and more than 1 for one image.
        kind, half = problem.kind, problem.dtype in (torch.float16, torch.bfloat16)
        if kind not in (Kind.CONVOLUTION, Kind.PROGRAM) or not half or device.properties(problem.device)[0] != 90:
            return False
        if kind is Kind.PROGRAM:
            n, _, h, w = problem.shape
            return n * h * w >= _ENOUGH_PIXELS
        stem = problem.conv.in_channels % 8 != 0
        bias_alone = not problem.epilogue.relu
        return stem or bias_alone
