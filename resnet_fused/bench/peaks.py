"""What a machine can do at most: its arithmetic peak and its memory bandwidth, measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from resnet_fused import config
from resnet_fused.backends import available_backends, gpu_time
from resnet_fused.backends.processor import processor

# Larger than any cache by far.
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
# Rows and columns of the matrices whose product is a GPU's peak, and how often each is timed.
_MATRIX, _TURNS = 8192, 9


# Limits of oneDNN that leave no instructions for a dtype.
_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
_LIMITS = {"bfloat16": _WITHOUT_BFLOAT16, "float16": _WITHOUT_BFLOAT16 | {"AVX512_CORE_BF16", "AVX512_CORE_AMX"}}


def emulated(dtype: str) -> str | None:
    """Why stock emulates products of this dtype on this CPU, at many times the time of float32; None if it doesn't."""
    if not processor().multiplies(dtype):
        return f"{processor()} has no instructions for it"
    limit = config.onednn_limit()
    return f"ONEDNN_MAX_CPU_ISA is {limit}" if limit in _LIMITS.get(dtype, ()) else None


def measure_peak(dtype: torch.dtype, device: str = "cpu") -> float | None:
    """The peak for the dtype, GFLOP/s; None where it can't be measured.

    Of a CPU: of multiply-adds on PyTorch's threads. Of a GPU: what a large matrix product reaches, in float32 with TF32 where
    convolutions may use it.
    """
    if device != "cpu":
        return _peak_of_gpu(dtype, device)
    if "cpu" not in available_backends():
        return None
    ops = torch.ops.resnet_fused_cpu
    pairs = dtype == torch.bfloat16 and ops.avx512_bf16()
    return ops.measure_peak(pairs)


def _peak_of_gpu(dtype: torch.dtype, device: str) -> float:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    # Convolutions and matrix products have settings of their own.
    matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        with torch.cuda.device(device):
            a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
            times = [gpu_time.elapsed(lambda: a @ b, 1) for _ in range(_TURNS)]
    finally:
        matmul.fp32_precision = before
    return 2 * _MATRIX**3 / statistics.median(times) * 1e-6


def measure_bandwidth(device: str = "cpu") -> float:
    """Memory bandwidth, GB/s: median of copies, of which each byte is read and written. Of a CPU with PyTorch's threads."""
    count = _COPIED_BYTES["cpu" if device == "cpu" else "cuda"]
    source = torch.zeros(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(_TURNS):
        if device == "cpu":
            start = time.perf_counter()
            target.copy_(source)
            times.append((time.perf_counter() - start) * 1e3)
        else:
            with torch.cuda.device(device):
                times.append(gpu_time.elapsed(lambda: target.copy_(source), 1))
    return 2 * count / statistics.median(times) * 1e-6
