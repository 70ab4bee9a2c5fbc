"""What is known of each piece of shared memory: written or not, by whom, read by whom, and since which barrier.

Each warp of a block has a vector clock, joined at barriers; an access that another warp's clock does not cover is a race.
Shared memory is watched in granules, as small as the smallest shared access of the kernel.

Source: PTX ISA, "Memory Consistency Model"; vector clocks after Flanagan and Freund, FastTrack, PLDI 2009.
"""

from __future__ import annotations

import numpy as np

UNWRITTEN, PENDING = 0, -1  # a granule's state, else (clock << 5 | warp of the block) of its last write


class Clocks:
    """One vector clock for each warp: ``time[w, v]`` is the latest time of warp v (of w's block) that w has synchronised with."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.blocks, self.warps = blocks, warps
        self.time = np.zeros((blocks * warps, warps), np.int32)
        self.own = np.zeros(blocks * warps, np.int32)
        self.floor = 0
        self.reset()

    def reset(self) -> None:
        self.time[:] = 0
        own = np.arange(self.blocks * self.warps)
        self.time[own, own % self.warps] = 1
        self._changed()

    def _changed(self) -> None:
        own = np.arange(self.blocks * self.warps)
        self.own = self.time[own, own % self.warps]
        self.floor = int(self.time.min())

    def barrier(self) -> None:
        """In every block, all warps have met."""
        time = self.time.reshape(self.blocks, self.warps, self.warps)
        time[:] = time.max(axis=1, keepdims=True)
        diagonal = np.arange(self.warps)
        time[:, diagonal, diagonal] += 1
        self._changed()

    def release(self, warps: np.ndarray) -> np.ndarray:
        """These warps (numbers in the batch) arrive; returns the joined clock that a waiter acquires."""
        joined = self.time[warps].max(axis=0)
        self.time[warps, warps % self.warps] += 1
        self._changed()
        return joined

    def acquire(self, warps: np.ndarray, joined: np.ndarray) -> None:
        """These warps have waited for the arrivals whose joined clock this is."""
        self.time[warps] = np.maximum(self.time[warps], joined)
        self._changed()


class Shadow:
    """The state of all granules of the shared memory of a batch of blocks.

    The methods take granule numbers (lanes, granules of one access) and the warp of each lane, and return a mask of the lanes
    that did wrong, or None where none did.
    """

    def __init__(self, granules: int, clocks: Clocks, atomics: bool) -> None:
        self.clocks, self.warps = clocks, clocks.warps
        self.state = np.zeros(granules, np.int32)
        self.reads = np.zeros(granules * self.warps, np.int32)
        self.atomics = np.zeros(granules * self.warps, np.int32) if atomics else None

    def reset(self) -> None:
        self.state[:] = UNWRITTEN
        self.reads[:] = 0
        if self.atomics is not None:
            self.atomics[:] = 0

    def unusable(self, granules: np.ndarray) -> np.ndarray | None:
        """Lanes that read what was never written, or what a cp.async has not delivered yet."""
        state = self.state[granules]
        return (state <= 0).any(axis=1) if state.min(initial=1) <= 0 else None

    def pending(self, granules: np.ndarray) -> np.ndarray | None:
        """Lanes that touch the destination of a cp.async that was not waited for."""
        state = self.state[granules]
        return (state < 0).any(axis=1) if state.min(initial=1) < 0 else None

    def _unordered_writes(self, granules: np.ndarray, warps: np.ndarray) -> np.ndarray | None:
        state = self.state[granules]
        time = state >> 5
        if time.max(initial=0) <= self.clocks.floor:
            return None
        late = time > self.clocks.time[warps[:, None], state & 31]
        return late.any(axis=1) if late.any() else None

    def _unordered(self, record: np.ndarray, granules: np.ndarray, warps: np.ndarray) -> np.ndarray | None:
        late = record.reshape(-1, self.warps)[granules] > self.clocks.time[warps][:, None, :]
        return late.any(axis=(1, 2)) if late.any() else None

    def read(self, granules: np.ndarray, warps: np.ndarray) -> np.ndarray | None:
        """Lanes whose read races with a write of another warp; notes the reads."""
        racing = self._unordered_writes(granules, warps)
        if self.atomics is not None:
            racing = _either(racing, self._unordered(self.atomics, granules, warps))
        self.reads[granules * self.warps + (warps % self.warps)[:, None]] = self.clocks.own[warps][:, None]
        return racing

    def write(self, granules: np.ndarray, warps: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Lanes whose write races with (writes, reads) of another warp. Does not note the write: see ``wrote``."""
        writes, reads = self._unordered_writes(granules, warps), self._unordered(self.reads, granules, warps)
        if self.atomics is not None:
            reads = _either(reads, self._unordered(self.atomics, granules, warps))
        return writes, reads

    def wrote(self, granules: np.ndarray, warps: np.ndarray) -> None:
        self.state[granules] = (self.clocks.own[warps] << 5 | warps % self.warps)[:, None]

    def atomic(self, granules: np.ndarray, warps: np.ndarray) -> np.ndarray | None:
        """Lanes whose atomic races with a plain access of another warp; notes the atomics."""
        racing = _either(self._unordered_writes(granules, warps), self._unordered(self.reads, granules, warps))
        assert self.atomics is not None, "decoding allots the record of atomics"
        self.atomics[granules * self.warps + (warps % self.warps)[:, None]] = self.clocks.own[warps][:, None]
        return racing


def _either(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a | b
