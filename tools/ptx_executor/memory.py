"""Device memory: allocations with edges, and what is known of each byte.

Each byte has a state: allocated or not, ever written or not, and whether the running launch read or wrote it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

GLOBAL_BASE = 1 << 32  # lower addresses are never valid, so null pointers and truncated ones are caught
VALID, WRITTEN, READ_NOW, WRITTEN_NOW = 1, 2, 4, 8
_GUARD = 512  # unallocated bytes between allocations


class Memory:
    """The global memory of an emulated device.

    Allocations are 256-byte aligned and at least 512 bytes apart, so that an access past an edge hits no other
    allocation.
    """

    def __init__(self) -> None:
        self.data = np.zeros(1 << 16, np.uint8)
        self.state = np.zeros(1 << 16, np.uint8)
        self._top = _GUARD
        self._sizes: dict[int, int] = {}
        self.symbols: dict[int, dict[str, int]] = {}  # id of a module -> address of each of its variables

    # ---- allocation ------------------------------------------------------------------------------------------------
    def empty(self, nbytes: int) -> int:
        """Allocate ``nbytes`` bytes whose content is undefined; reading one before it is written is a fault."""
        if nbytes < 0:
            raise ValueError(f"nbytes={nbytes}: an allocation cannot have a negative size; pass 0 or more bytes")
        start = -(-self._top // 256) * 256
        end = start + max(int(nbytes), 1)
        if end + _GUARD > self.data.size:
            grown = max(2 * self.data.size, end + _GUARD + 65536) - self.data.size
            self.data = np.concatenate([self.data, np.zeros(grown, np.uint8)])
            self.state = np.concatenate([self.state, np.zeros(grown, np.uint8)])
        self.data[start:end] = 0xFF  # NaN in every floating-point format, should undefined bytes be looked at
        self.state[start : start + int(nbytes)] = VALID
        self._top = end + _GUARD
        self._sizes[start + GLOBAL_BASE] = int(nbytes)
        return start + GLOBAL_BASE

    def zeros(self, nbytes: int) -> int:
        """Allocate ``nbytes`` zero bytes."""
        address = self.empty(nbytes)
        self.write(address, np.zeros(nbytes, np.uint8))
        return address

    def upload(self, array: Any) -> int:
        """Allocate and fill memory with a NumPy array or a torch tensor (of any dtype), in its own memory layout.

        A dense tensor in another order of dimensions (channels_last, transposed) keeps that order. Returns the
        address that data_ptr() would have.
        """
        raw = _storage_bytes(array)
        address = self.empty(raw.size)
        self.write(address, raw)
        return address

    def empty_like(self, array: Any) -> int:
        """Allocate memory for an array of this size and layout, with undefined content."""
        return self.empty(_storage_bytes(array).size)

    # ---- host access -----------------------------------------------------------------------------------------------
    def _range(self, address: int, nbytes: int) -> slice:
        start = address - GLOBAL_BASE
        if start < 0 or start + nbytes > self.data.size or not (self.state[start : start + nbytes] & VALID).all():
            raise ValueError(
                f"address={address:#x}: {nbytes} bytes from there are not inside one allocation; "
                f"use an address that empty, zeros or upload returned"
            )
        return slice(start, start + nbytes)

    def write(self, address: int, array: Any) -> None:
        """Copy the bytes of an array to memory that is already allocated."""
        raw = _storage_bytes(array)
        where = self._range(address, raw.size)
        self.data[where] = raw
        self.state[where] |= WRITTEN

    def download(self, address: int, dtype: Any, shape: int | tuple[int, ...], *, allow_unwritten: bool = False) -> Any:
        """A copy of memory: a NumPy array, or a torch tensor where ``dtype`` is a torch dtype.

        Raises:
            ValueError: outside of the allocation, or a byte was never written (unless ``allow_unwritten``).
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        torch = _torch_of(dtype)
        itemsize = dtype.itemsize if torch else np.dtype(dtype).itemsize
        where = self._range(address, int(np.prod(shape, dtype=np.int64)) * itemsize)
        if not allow_unwritten:
            self._require_written(where)
        raw = self.data[where].copy()
        return torch.from_numpy(raw).view(dtype).reshape(shape) if torch else raw.view(dtype).reshape(shape)

    def download_into(self, address: int, array: Any) -> None:
        """Copy memory into a tensor or array that has the layout it was uploaded with.

        Raises:
            ValueError: a byte of it was never written.
        """
        target = _storage_bytes(array, writable=True)
        where = self._range(address, target.size)
        self._require_written(where)
        target[:] = self.data[where]

    def _require_written(self, where: slice) -> None:
        missing = np.flatnonzero(~self.state[where] & WRITTEN)
        if missing.size:
            raise ValueError(
                f"address={where.start + GLOBAL_BASE:#x}: {missing.size} of {where.stop - where.start} bytes were "
                f"never written (first at +{missing[0]}); the kernel left part of its output out"
            )

    # ---- for the executor ------------------------------------------------------------------------------------------
    def start_launch(self) -> None:
        """Forget what earlier launches touched."""
        self.state &= VALID | WRITTEN

    def touched(self) -> tuple[int, int]:
        """Distinct bytes that the launch read, and wrote."""
        return int(np.count_nonzero(self.state & READ_NOW)), int(np.count_nonzero(self.state & WRITTEN_NOW))

    def describe(self, address: int) -> str:
        """Where an address lies with respect to the nearest allocation, for messages."""
        gaps = {a: a - address if address < a else max(address - (a + n) + 1, 0) for a, n in self._sizes.items()}
        if not gaps:
            return f"address {address:#x}, and nothing is allocated"
        start = min(gaps, key=gaps.__getitem__)
        where = f"the {self._sizes[start]}-byte allocation at {start:#x}"
        if gaps[start] == 0:
            return f"address {address:#x} is at byte {address - start} of {where}"
        side = "before" if address < start else "past the end of"
        return f"address {address:#x} is {gaps[start]} bytes {side} {where}"


def _torch_of(dtype: Any) -> Any:
    """The torch module if this is one of its dtypes."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(dtype, torch.dtype) else None


def _storage_bytes(array: Any, writable: bool = False) -> np.ndarray:
    """The bytes of a dense array or tensor in memory order, as a flat uint8 array (a view where it can be)."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        tensor = array.detach()
        if tensor.device.type != "cpu":
            raise ValueError(f"array is on {tensor.device}: memory is filled from the CPU; pass array.cpu()")
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * s for n, s in strides) if tensor.numel() else 0
        if extent != tensor.numel():
            raise ValueError(
                f"array has shape {tuple(tensor.shape)} and strides {tensor.stride()}: only a tensor without gaps or "
                f"overlaps can be copied in its own layout; pass array.contiguous()"
            )
        flat = tensor.as_strided((extent,), (1,))
        return flat.view(torch.uint8).numpy() if extent else np.zeros(0, np.uint8)
    dense = np.asarray(array)
    if writable and not dense.flags.c_contiguous:
        raise ValueError("array is not C-contiguous: pass np.ascontiguousarray(array)")
    return np.ascontiguousarray(dense).reshape(-1).view(np.uint8)
