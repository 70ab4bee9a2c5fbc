"""What each backend refuses of the cases of the op tests, and in which words: a table, for each device and kind of CPU.

A backend that begins to refuse what it served, or to serve what it refused, fails the op tests. Whoever changes what a backend
serves changes this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16

# Grouped convolutions of geometries that the CPU kernels don't serve.
OTHER_GROUPS = {"stride-of-columns-to-one-bfloat16", "groups-5x5", "groups-dilated", "depthwise-stride-3", "depthwise-uneven"}


class Asked(NamedTuple):
    """What the table knows of a case."""

    id: str
    op: str
    dtype: torch.dtype
    empty: bool = False
    groups: int = 1
    stock_fails: bool = False
    channels_last: bool = True


class Machine(NamedTuple):
    """What refusals depend on, beside the case."""

    device: str
    onednn_bf16: bool = False
    onednn_fp16: bool = False
    capability: int = 0

    @classmethod
    def here(cls, device: str) -> Machine:
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            return cls(device, capability=10 * major + minor)
        supported = torch.ops.mkldnn
        return cls(device, onednn_bf16=supported._is_mkldnn_bf16_supported(), onednn_fp16=supported._is_mkldnn_fp16_supported())


def refusal(backend: str, asked: Asked, machine: Machine) -> str | None:
    """The words in which a backend refuses a case on a machine; None if it serves it."""
    table = {"cpu": _cpu, "onednn": _onednn, "cuda": _cuda, "cudnn": _cudnn, "triton": _triton}
    return next(table[backend](asked, machine), None) if backend in table else None


# Kernels that are known to be right only when they are tried: cuDNN may have no fused engine, or one that loses a NaN.
MAY_BE_REFUSED_WHEN_TRIED = {"cudnn"}


def _cpu(asked: Asked, machine: Machine) -> Iterator[str]:
    if machine.device != "cpu":
        yield "it serves CPU tensors"
    if asked.dtype == F64:
        yield "it serves float32, bfloat16 and float16, not"
    if asked.empty:
        yield "empty"
    if asked.id in OTHER_GROUPS:
        yield "with a stride of 1 or 2 both ways and no dilation"


def _onednn(asked: Asked, machine: Machine) -> Iterator[str]:
    if machine.device != "cpu":
        yield "it serves CPU tensors"
    if asked.dtype == F64:
        yield "it serves float32, bfloat16 and float16"
    if asked.dtype == BF16 and not machine.onednn_bf16:
        yield "no bfloat16 arithmetic"
    if asked.dtype == F16 and not machine.onednn_fp16:
        yield "no float16 arithmetic"
    if asked.empty:
        yield "empty"
    # A dilated filter of one tap is none, and the only such case that oneDNN takes.
    if asked.stock_fails and asked.id != "dilated-1x1":
        yield "fails on this geometry"


def _gpu(asked: Asked, machine: Machine) -> Iterator[str]:
    if machine.device != "cuda":
        yield "it serves cuda tensors"
    if asked.dtype == F64:
        yield "it serves float32, float16 and bfloat16"
    if asked.empty:
        yield "empty"
    if asked.dtype == BF16 and machine.capability < 80:
        yield "compute capability 8.0"


def _cuda(asked: Asked, machine: Machine) -> Iterator[str]:
    yield from _gpu(asked, machine)
    if asked.groups != 1:
        yield "one group"


def _triton(asked: Asked, machine: Machine) -> Iterator[str]:
    yield from _gpu(asked, machine)


def _cudnn(asked: Asked, machine: Machine) -> Iterator[str]:
    yield from _gpu(asked, machine)
    if asked.op == "conv2d_bn" and not asked.channels_last:
        yield "there is no pass for it"
