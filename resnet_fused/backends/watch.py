"""Notices writes to parameters that leave their version counter as it was: through `.data`, by numpy, by another process.

With the compiled library csrc/cpu/watch.cpp does the work; without it the same is done here, in at most 1% of the time.
"""

from __future__ import annotations

import ctypes
import itertools
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from resnet_fused.backends import library


class Watch:
    """Whether the tensors' memory is as it was when the watch was made.

    What `unchanged` notices:

    - At once: another data pointer (`.data = other`, `module.to(device)`), any write to a tensor of up to 128 bytes, and of
      larger ones a write to all of it, since a few words of each are compared, bit by bit, in every call.
    - Within `calls` calls, counted over all threads: any other write to CPU memory, a single element's too. A call compares the
      checksum of 48 KiB, one part of the memory after the other.

    Without the compiled library memory is only looked at where that takes no more than 1% of the time since it was last, and
    `calls` counts the calls that look. Each of them compares one place of every tensor, and of a tensor in more than 4096
    separate pieces no others than that many are compared at all.

    What it doesn't notice: a write that is undone before it is looked at; until its part's turn, a write that leaves the words
    compared in every call as they were; writes to memory that isn't the CPU's, where only the data pointer is compared;
    anything about nested tensors and those without a data pointer (sparse, mkldnn, wrappers with a `__torch_dispatch__` of
    their own); and another tensor put in a module's place for the one given here.

    What was noticed once stays: from then on `unchanged` is False. The tensors live as long as the watch; it can be asked by
    several threads, under any mode, and outlive the interpreter's exit.

    Args:
        tensors: of any dtype, device, layout and strides. Bytes between a view's elements belong to others, and don't count.

    Attributes:
        calls: in which all of the memory is looked at once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            watched = [tensor for tensor in tensors if _has_data(tensor)]
            native = library.load("resnet_fused_cpu") is None
            self._eyes: _Eyes = _Native(watched) if native else _Checksums(watched)
        self.calls = self._eyes.calls

    def unchanged(self) -> bool:
        return self._eyes.unchanged()


class _Eyes(Protocol):
    calls: int

    def unchanged(self) -> bool: ...


def _has_data(tensor: Tensor) -> bool:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    try:
        tensor.data_ptr()
        return not tensor.is_nested
    except (RuntimeError, ValueError):  # without storage; not initialised
        return False


class _Native:
    def __init__(self, tensors: list[Tensor]) -> None:
        ops = torch.ops.resnet_fused_cpu
        # Not through the dispatcher: modes, which watch or trace a model's operators, have nothing to do with this.
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self._ask = ops.watch_unchanged.default.redispatch
        self._id: int = ops.new_watch.default.redispatch(self._keys, tensors)
        self.calls: int = ops.watch_parts.default.redispatch(self._keys, self._id)
        # Not at the interpreter's exit, where the operator may be gone already.
        weakref.finalize(self, ops.delete_watch.default.redispatch, self._keys, self._id).atexit = False

    def unchanged(self) -> bool:
        return self._ask(self._keys, self._id)


_Piece = ctypes.Array[ctypes.c_char]

_PIECE, _PART, _MOST_RUNS = 16 << 10, 64 << 10, 4096
_SMALLEST = 256  # bytes; a smaller piece takes as long
_SAMPLE = 64
_SHARE = 0.01  # of the time


class _Checksums:
    """By zlib, which needs no operator of PyTorch, and neither copies nor allocates."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [(tensor, tensor.data_ptr()) for tensor in tensors]
        self._samples: list[_Piece] = []
        self._parts: list[list[_Piece]] = []
        room = 0
        for tensor in tensors:
            pieces = [*_pieces(tensor)]
            if pieces:
                self._samples.append(_sample(pieces[len(pieces) // 2]))
            for piece in pieces:
                room -= max(len(piece), _SMALLEST)
                if room < 0:
                    self._parts.append([])
                    room = _PART - max(len(piece), _SMALLEST)
                self._parts[-1].append(piece)
        self._samples_were = _checksum(self._samples)
        self._parts_were = [_checksum(part) for part in self._parts]
        self.calls = len(self._parts)
        self._turn = itertools.count()
        self._next_look = 0.0
        self._changed = False

    def unchanged(self) -> bool:
        # Where `.data` was set to another tensor the memory known here may be gone: this comes before anything is read.
        with torch._C.DisableTorchFunctionSubclass():
            self._changed = self._changed or any(tensor.data_ptr() != data for tensor, data in self._tensors)
        now = time.perf_counter()
        if not self._changed and self._parts and now >= self._next_look:
            part = next(self._turn) % len(self._parts)
            self._changed = (
                _checksum(self._samples) != self._samples_were or _checksum(self._parts[part]) != self._parts_were[part]
            )
            self._next_look = now + (time.perf_counter() - now) / _SHARE
        return not self._changed


def _checksum(pieces: Iterable[_Piece]) -> int:
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _memory(address: int, size: int) -> _Piece:
    return (ctypes.c_char * size).from_address(address)


def _sample(piece: _Piece) -> _Piece:
    size = min(len(piece), _SAMPLE)
    return _memory(ctypes.addressof(piece) + (len(piece) - size) // 2, size)


def _pieces(tensor: Tensor) -> Iterator[_Piece]:
    """The memory of a dense CPU tensor, in pieces of adjacent bytes."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return
    run = tensor.element_size()
    # By stride, in bytes; an expanded dimension is the same memory again.
    dimensions = sorted((stride * run, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    dimensions = [(stride, size) for stride, size in dimensions if size > 1 and stride > 0]
    while dimensions and dimensions[0][0] == run:
        run *= dimensions.pop(0)[1]
    extent = sum(stride * (size - 1) for stride, size in dimensions) + run
    if tensor.storage_offset() * tensor.element_size() + extent > tensor.untyped_storage().nbytes():
        return
    runs = 1
    for _, size in dimensions:
        runs *= size
    for i in range(0, runs, -(-runs // _MOST_RUNS)):
        offset, index = 0, i
        for stride, size in dimensions:
            offset += index % size * stride
            index //= size
        begin = tensor.data_ptr() + offset
        for column in range(0, run, _PIECE):
            yield _memory(begin + column, min(_PIECE, run - column))
