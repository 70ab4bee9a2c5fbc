"""What is known of each piece of shared memory: written or not, by whom, read by whom, and since which barrier.

Each warp of a block has a vector clock, joined at barriers; an access that another warp's clock does not cover is a
race. Lanes of one warp race where they meet without bar.warp.sync between. Shared memory is watched in granules, as
small as the smallest shared access of the kernel.

Source: PTX ISA, "Memory Consistency Model"; vector clocks after Flanagan and Freund, FastTrack, PLDI 2009.
"""

from __future__ import annotations

import numpy as np

# A granule's state is one of these, else that of its last write: time << 10 | warp of the block << 5 | lane.
UNWRITTEN, PENDING = 0, -1
_SEVERAL = 32  # in place of a lane, in the record of reads (time << 6 | lane) and of atomics


class Clocks:
    """One vector clock for each warp: ``time[w, v]`` is the latest time of warp v (of w's block) that w has
    synchronised with."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.blocks, self.warps = blocks, warps
        self._index = np.arange(blocks * warps)
        self.time = np.zeros((blocks * warps, warps), np.int32)
        self.own = np.zeros(blocks * warps, np.int32)
        self.floor = 0  # up to this time every access is ordered before all that follows
        self.flags: dict[int, np.ndarray] = {}  # address of a synchronisation variable -> the clock released there
        self.reset()

    def reset(self) -> None:
        self.flags.clear()
        self.time[:] = 0
        self.time[self._index, self._index % self.warps] = 1
        self._changed()

    def _changed(self) -> None:
        diagonal = self._index, self._index % self.warps
        self.own = self.time[diagonal]
        seen = self.time.copy()
        seen[diagonal] -= 1  # a warp's lanes have met up to the time before its present one
        self.floor = int(seen.min())

    def barrier(self) -> None:
        """In every block, all warps have met."""
        time = self.time.reshape(self.blocks, self.warps, self.warps)
        time[:] = time.max(axis=1, keepdims=True)
        diagonal = np.arange(self.warps)
        time[:, diagonal, diagonal] += 1
        self._changed()

    def advance(self, warps: np.ndarray) -> None:
        """The lanes of each of these warps have met."""
        self.time[warps, warps % self.warps] += 1
        self._changed()

    def release(self, warps: np.ndarray) -> np.ndarray:
        """These warps (numbers in the batch) arrive; returns the joined clock that a waiter acquires."""
        joined = self.time[warps].max(axis=0)
        self.advance(warps)
        return joined

    def acquire(self, warps: np.ndarray, joined: np.ndarray) -> None:
        """These warps have waited for the arrivals whose joined clock this is."""
        self.time[warps] = np.maximum(self.time[warps], joined)
        self._changed()

    def synchronise(self, addresses: np.ndarray, warps: np.ndarray, *, release: bool, acquire: bool) -> None:
        """Accesses of synchronisation variables, which order what came before a release and after an acquire of the
        same one."""
        for address, warp in sorted(set(zip(addresses.tolist(), warps.tolist(), strict=True))):
            one = np.array([warp])
            if acquire and address in self.flags:
                self.acquire(one, self.flags[address])
            if release:
                self.flags[address] = np.maximum(self.flags.get(address, 0), self.release(one))


class Shadow:
    """The state of all granules of the shared memory of a batch of blocks.

    The methods take granule numbers (accesses, granules of one access) and the lane (of the batch) of each access,
    and return a mask of the accesses that did wrong, or None where none did.
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
        """Reads of what was never written, or what a cp.async has not delivered yet."""
        state = self.state[granules]
        return (state <= 0).any(axis=1) if state.min(initial=1) <= 0 else None

    def pending(self, granules: np.ndarray) -> np.ndarray | None:
        """Accesses of the destination of a cp.async that was not waited for."""
        state = self.state[granules]
        return (state < 0).any(axis=1) if state.min(initial=1) < 0 else None

    def _after_writes(self, granules: np.ndarray, lanes: np.ndarray) -> np.ndarray | None:
        """Accesses that are not ordered after the last write."""
        state = self.state[granules]
        time = state >> 10
        if time.max(initial=0) <= self.clocks.floor:
            return None
        warps, writer = (lanes >> 5)[:, None], state >> 5 & 31
        late = time > self.clocks.time[warps, writer]
        same_warp = (writer == warps % self.warps) & (time == self.clocks.own[warps])
        late |= same_warp & ((state & 31) != (lanes & 31)[:, None])
        return late.any(axis=1) if late.any() else None

    def _after(self, record: np.ndarray, granules: np.ndarray, lanes: np.ndarray) -> np.ndarray | None:
        """Accesses that are not ordered after all accesses of a record."""
        seen = record.reshape(-1, self.warps)[granules]
        time, warps = seen >> 6, lanes >> 5
        if time.max(initial=0) <= self.clocks.floor:
            return None
        late = time > self.clocks.time[warps][:, None, :]
        own = np.arange(self.warps) == (warps % self.warps)[:, None]
        late |= own[:, None, :] & (time == self.clocks.own[warps][:, None, None]) & ((seen & 63) != (lanes & 31)[:, None, None])
        return late.any(axis=(1, 2)) if late.any() else None

    def _note(self, record: np.ndarray, granules: np.ndarray, lanes: np.ndarray) -> None:
        warps = lanes >> 5
        at = granules * self.warps + (warps % self.warps)[:, None]
        entry = (self.clocks.own[warps] << 6 | lanes & 31)[:, None]
        before = record[at]
        record[at] = entry
        several = record[at] != entry
        if before.max(initial=0) >= entry.min():  # some granule was read since the last barrier
            several |= ((before ^ entry) >> 6 == 0) & (before != entry)
        if several.any():
            at, entry = at[several], np.broadcast_to(entry, several.shape)[several]
            record[at] = entry & ~63 | _SEVERAL

    def read(self, granules: np.ndarray, lanes: np.ndarray) -> np.ndarray | None:
        """Reads that race with a write; notes the reads."""
        racing = self._after_writes(granules, lanes)
        if self.atomics is not None:
            racing = _either(racing, self._after(self.atomics, granules, lanes))
        self._note(self.reads, granules, lanes)
        return racing

    def write(self, granules: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Writes that race with (a write, a read). Does not note the write: see ``wrote``."""
        writes, reads = self._after_writes(granules, lanes), self._after(self.reads, granules, lanes)
        if self.atomics is not None:
            reads = _either(reads, self._after(self.atomics, granules, lanes))
        return writes, reads

    def wrote(self, granules: np.ndarray, lanes: np.ndarray) -> None:
        warps = lanes >> 5
        self.state[granules] = (self.clocks.own[warps] << 10 | (warps % self.warps) << 5 | lanes & 31)[:, None]

    def atomic(self, granules: np.ndarray, lanes: np.ndarray) -> np.ndarray | None:
        """Atomics that race with a plain access; notes the atomics."""
        racing = _either(self._after_writes(granules, lanes), self._after(self.reads, granules, lanes))
        assert self.atomics is not None, "the program was searched for shared atomics"
        self._note(self.atomics, granules, lanes)
        return racing


def _either(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a | b


class BlockRaces:
    """Which blocks wrote and read each granule of global memory in this launch: blocks are not ordered among each
    other.

    A block that has used an atomic, a fence or a volatile access on global memory may have ordered itself, and is not
    blamed.
    """

    def __init__(self, size: int, granule: int, blocks: int) -> None:
        self.granule = granule
        self.writer = np.zeros(size // granule, np.int32)  # block + 1
        self.reader = np.zeros(size // granule, np.int32)  # block + 1, or -1 for several
        self.ordered = np.zeros(blocks, bool)

    def granules(self, offset: np.ndarray, size: int) -> np.ndarray:
        return (offset // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def read(self, granules: np.ndarray, blocks: np.ndarray) -> np.ndarray | None:
        """Reads of what another block wrote."""
        writer, me = self.writer[granules], (blocks + 1)[:, None]
        before = self.reader[granules]
        self.reader[granules] = me
        several = (self.reader[granules] != me) | ((before != 0) & (before != me))
        if several.any():
            self.reader[granules[several]] = -1
        bad = (writer != 0) & (writer != me)
        return bad.any(axis=1) & ~self.ordered[blocks] if bad.any() else None

    def write(self, granules: np.ndarray, blocks: np.ndarray) -> np.ndarray | None:
        """Writes of what another block wrote or read; notes the writes."""
        me = (blocks + 1)[:, None]
        writer, reader = self.writer[granules], self.reader[granules]
        self.writer[granules] = me
        bad = ((writer != 0) & (writer != me)) | ((reader != 0) & (reader != me)) | (self.writer[granules] != me)
        return bad.any(axis=1) & ~self.ordered[blocks] if bad.any() else None
