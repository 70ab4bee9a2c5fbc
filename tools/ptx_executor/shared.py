"""Shared memory: checked and watched accesses, wavefronts of every request.

Source: PTX ISA, "Shared State Space"; banks after the CUDA C++ Programming Guide, "Shared Memory".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counters import wavefronts
from .machine import SHARED_START, Machine, Selection, lanes_of
from .races import Clocks, Shadow
from .spaces import RAW, Access, Space, poison
from .syntax import Instruction


@dataclass
class Accesses:
    """The accesses of one instruction: ``where`` in the batch's bytes, their granules, and the lane of each."""

    access: Access
    where: np.ndarray
    granules: np.ndarray
    lanes: np.ndarray


class SharedSpace(Space):
    """Shared memory of every block of the batch, watched by a Shadow."""

    name = "shared"

    def __init__(self, machine: Machine, size: int, granule: int, atomics: bool, fences: bool) -> None:
        super().__init__(machine)
        self.size, self.stride, self.granule, self.fences = size, -(-max(size, 1) // 128) * 128, granule, fences
        self.bytes = np.full(machine.blocks * self.stride, 0xFF, np.uint8)
        self.data = {n: self.bytes.view(RAW[n]) for n in RAW}
        self.base = machine.block_of * self.stride - SHARED_START
        self.clocks = Clocks(machine.blocks, machine.warps)
        self.shadow = Shadow(self.bytes.size // granule, self.clocks, atomics)

    def reset(self) -> None:
        self.bytes[:] = 0xFF
        self.clocks.reset()
        self.shadow.reset()

    def index(self, ins: Instruction, size: int, address: np.ndarray, selection: Selection) -> np.ndarray:
        """Check bounds and alignment; the byte index in ``bytes`` of each access."""
        offset = address.astype(np.int64)
        self.aligned(ins, offset, size, selection)
        if offset.min() < SHARED_START or offset.max() + size > SHARED_START + self.size:
            bad = (offset < SHARED_START) | (offset + size > SHARED_START + self.size)
            at = int(offset[np.flatnonzero(bad)[0]]) - SHARED_START
            message = f"{size} bytes at byte {at} of the block's {self.size} bytes of shared memory"
            raise self.error("out-of-bounds", ins, bad, selection, message)
        return offset + (self.base if selection is None else self.base[selection])

    def accesses(self, access: Access, where: np.ndarray, selection: Selection) -> Accesses:
        granules = (where // self.granule)[:, None] + np.arange(max(access.size // self.granule, 1))
        return Accesses(access, where, granules, lanes_of(self.machine, selection))

    def fault(self, kind: str, these: Accesses, bad: np.ndarray, message: str) -> None:
        k = int(np.flatnonzero(bad)[0])
        at = int(these.where[k]) % self.stride
        self.machine.fault(kind, these.access.ins, int(these.lanes[k]), f"byte {at} of shared memory: {message}")

    def count(self, kind: str, access: Access, where: np.ndarray, selection: Selection) -> None:
        """Count wavefronts: 32 lanes are served together up to 4 bytes a lane, 16 for 8 bytes, 8 for 16."""
        words = self.by_warp(where >> 2, selection)
        requests = int(np.count_nonzero(words.max(axis=1) >= 0))
        per_lane = max(access.size // 4, 1)
        if per_lane > 1:
            words = words[..., None] + np.where(words < 0, 0, 1)[..., None] * np.arange(per_lane)
        units, ideal = wavefronts(words.reshape(-1, 32))
        self.line(kind, access.ins).traffic.add(requests, len(where) * access.size, units, ideal)

    def synchronise(self, these: Accesses, *, release: bool, acquire: bool) -> None:
        """Volatile, release and acquire accesses order what is around them; relaxed ones do with a fence."""
        modifiers = these.access.ins.modifiers
        if self.fences or not {"volatile", "release", "acquire", "acq_rel"}.isdisjoint(modifiers):
            self.clocks.synchronise(these.where, these.lanes >> 5, release=release, acquire=acquire)

    def load(self, access: Access, address: np.ndarray, selection: Selection, kind: str = "shared_load") -> np.ndarray:
        where = self.index(access.ins, access.size, address, selection)
        self.count(kind, access, where, selection)
        raw = self.data[access.size][where // access.size]
        these = self.accesses(access, where, selection)
        if not self.defined(these, raw):
            return raw
        if access.strong:
            self.synchronise(these, release=False, acquire=True)
            return raw
        racing = self.shadow.read(these.granules, these.lanes)
        if racing is not None:
            poison(raw, racing)
            self.fault("shared-race", these, racing, "read, and another thread's write is not ordered by a barrier")
        return raw

    def defined(self, these: Accesses, raw: np.ndarray) -> bool:
        """Whether all that was read had been written and delivered; poisons what had not."""
        bad = self.shadow.unusable(these.granules)
        if bad is None:
            return True
        poison(raw, bad)
        pending = self.shadow.pending(these.granules)
        if pending is not None:
            self.fault("async-not-waited", these, pending, "read before the wait for the cp.async that fills it")
        else:
            self.fault("uninitialised-shared", these, bad, "read before anything was written there")
        return False

    def store(
        self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection, kind: str = "shared_store"
    ) -> None:
        where = self.index(access.ins, access.size, address, selection)
        self.count(kind, access, where, selection)
        these, data, at = self.accesses(access, where, selection), self.data[access.size], where // access.size
        racing = self.claim(these, data[at] == raw)
        data[at] = raw
        clash = data[at] != raw
        if clash.any():
            poison(data, at[clash])
            self.fault("shared-race", these, clash, "several threads store different values at once")
        elif racing is not None:
            poison(data, at[racing])
        self.shadow.wrote(these.granules, these.lanes)

    def claim(self, these: Accesses, same: np.ndarray | None) -> np.ndarray | None:
        """The writes that race, if any; to write the value that is there already (``same``) is no race with its
        writer."""
        pending = self.shadow.pending(these.granules)
        if pending is not None:
            self.fault("async-not-waited", these, pending, "written before the wait for the cp.async that fills it")
        if these.access.strong:
            self.synchronise(these, release=True, acquire=False)
            return None
        writes, reads = self.shadow.write(these.granules, these.lanes)
        if writes is not None and same is not None:
            writes = writes & ~same
        if writes is not None and writes.any():
            self.fault("shared-race", these, writes, "written, and another thread's write is not ordered by a barrier")
            return writes
        if reads is not None:
            self.fault("shared-race", these, reads, "written, and another thread may still read it: no barrier between")
        return reads

    def atomic(self, access: Access, address: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        where = self.index(access.ins, access.size, address, selection)
        self.count("shared_atomic", access, where, selection)
        these = self.accesses(access, where, selection)
        bad = self.shadow.unusable(these.granules)
        if bad is not None:
            self.fault("uninitialised-shared", these, bad, "an atomic on memory that nothing has written")
        racing = self.shadow.atomic(these.granules, these.lanes)
        if racing is not None:
            self.fault("shared-race", these, racing, "an atomic, and another thread's access is not ordered by a barrier")
        self.synchronise(these, release=True, acquire=True)
        return self.data[access.size], where // access.size
