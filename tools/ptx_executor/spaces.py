"""The state spaces: checked loads and stores of global, shared, local and constant memory, and of generic addresses.

Source: PTX ISA, "State Spaces, Types, and Variables" and "Generic Addressing".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counters import Line, sectors, wavefronts
from .machine import (
    CONST_START,
    CONST_WINDOW,
    LOCAL_START,
    LOCAL_WINDOW,
    SHARED_START,
    SHARED_WINDOW,
    Machine,
    Selection,
    lanes_of,
)
from .memory import GLOBAL_BASE, READ_NOW, VALID, WRITTEN, WRITTEN_NOW, Memory
from .parser import Instruction
from .races import Clocks, Shadow

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}
ONES = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


@dataclass
class Access:
    """One memory instruction: bytes for each lane, where its traffic is counted, and whether it is an atomic or volatile one."""

    ins: Instruction
    size: int
    strong: bool = False


def poison(raw: np.ndarray, bad: np.ndarray) -> None:
    """Overwrite results with all-ones bytes: NaN in every floating-point format."""
    raw[bad] = np.full(raw.dtype.itemsize, 0xFF, np.uint8).view(raw.dtype)[0]


class Space:
    """A memory that lanes access; subclasses check an address and turn it into an index of ``data``."""

    name = ""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def line(self, kind: str, ins: Instruction) -> Line:
        return self.machine.counters.lines.setdefault((ins.line, kind), Line(kind, ins.text, ins.source))

    def aligned(self, ins: Instruction, offset: np.ndarray, size: int, selection: Selection) -> None:
        odd = offset & (size - 1)
        if odd.any():
            k = int(np.flatnonzero(odd)[0])
            lane = int(lanes_of(self.machine, selection)[k])
            raise self.machine.error("misaligned", ins, lane, f"{self.name} address {int(offset[k]):#x} is not a multiple of the {size} "
                                                              f"bytes that are accessed")  # fmt: skip

    def by_warp(self, values: np.ndarray, selection: Selection) -> np.ndarray:
        """Values as (warps, 32), -1 for the lanes outside of the selection."""
        if selection is None:
            return values.reshape(-1, 32)
        first, last = int(selection[0]) >> 5, int(selection[-1]) >> 5
        rows = np.full((last - first + 1) * 32, -1, np.int64)
        rows[selection - first * 32] = values
        return rows.reshape(-1, 32)


class GlobalSpace(Space):
    """Global memory: bounds and initialisation of every byte, sectors of every request."""

    name = "global"

    def __init__(self, machine: Machine, memory: Memory) -> None:
        super().__init__(machine)
        self.memory = memory
        self.data = {size: memory.data[: memory.data.size // 16 * 16].view(RAW[size]) for size in RAW}
        self.state = {size: memory.state[: memory.state.size // 16 * 16].view(RAW[size]) for size in ONES}
        self.limit = memory.data.size // 16 * 16

    def index(self, access: Access, address: np.ndarray, selection: Selection, need: int, mark: int) -> np.ndarray:
        """Check the accesses, mark the bytes, and return indices in units of the access size."""
        ins, size = access.ins, access.size
        offset = address.astype(np.int64) - GLOBAL_BASE
        self.aligned(ins, offset, size, selection)
        unit = min(size, 8)
        if offset.min() < 0 or offset.max() >= self.limit:
            self.out_of_bounds(ins, address, (offset < 0) | (offset >= self.limit), size, selection)
        where = offset // unit if size <= 8 else (offset >> 3)[:, None] + np.arange(2)
        state, ones = self.state[unit], self.state[unit].dtype.type(ONES[unit])
        seen = state[where]
        full = ones * state.dtype.type(need | mark)
        if ((seen & full) != full).any():
            valid, wanted = ones * state.dtype.type(VALID), ones * state.dtype.type(need)
            outside = ((seen & valid) != valid).reshape(len(offset), -1).any(axis=1)
            if outside.any():
                self.out_of_bounds(ins, address, outside, size, selection)
            unwritten = ((seen & wanted) != wanted).reshape(len(offset), -1).any(axis=1)
            if unwritten.any():
                k = int(np.flatnonzero(unwritten)[0])
                lane = int(lanes_of(self.machine, selection)[k])
                self.machine.fault(
                    "uninitialised-global",
                    ins,
                    lane,
                    f"{self.memory.describe(int(address[k]))}, which nothing has written",
                )
            state[where] |= ones * state.dtype.type(mark)
        return offset // size

    def out_of_bounds(
        self, ins: Instruction, address: np.ndarray, bad: np.ndarray, size: int, selection: Selection
    ) -> None:
        k = int(np.flatnonzero(bad)[0])
        lane = int(lanes_of(self.machine, selection)[k])
        raise self.machine.error(
            "out-of-bounds", ins, lane, f"{size} bytes of global memory: {self.memory.describe(int(address[k]))}"
        )

    def count(self, kind: str, access: Access, address: np.ndarray, selection: Selection, missing: int = 0) -> None:
        """Count a request of which ``missing`` bytes are not asked for."""
        rows = self.by_warp(address.astype(np.int64), selection)
        requests, units, ideal = sectors(rows, access.size, GLOBAL_BASE)
        self.line(kind, access.ins).traffic.add(
            requests, len(address) * access.size - missing, units, ideal - missing / 32
        )

    def fetch(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        return self.data[access.size][self.index(access, address, selection, VALID | WRITTEN, READ_NOW)]

    def load(self, access: Access, address: np.ndarray, selection: Selection, kind: str = "global_load") -> np.ndarray:
        self.count(kind, access, address, selection)
        return self.fetch(access, address, selection)

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        where = self.index(access, address, selection, VALID, WRITTEN | WRITTEN_NOW)
        self.count("global_store", access, address, selection)
        data = self.data[access.size]
        data[where] = raw
        clash = data[where] != raw
        if clash.any():
            k = int(np.flatnonzero(clash)[0])
            lane = int(lanes_of(self.machine, selection)[k])
            self.machine.fault("global-race", access.ins, lane, f"several threads store different values at once: "
                                                                f"{self.memory.describe(int(address[k]))}")  # fmt: skip
            data[where[clash]] = np.full(access.size, 0xFF, np.uint8).view(data.dtype)[0]

    def atomic(self, access: Access, address: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        """The memory (in units of the access size) and the index of each lane's word in it."""
        where = self.index(access, address, selection, VALID | WRITTEN, READ_NOW | WRITTEN_NOW)
        self.count("global_atomic", access, address, selection)
        return self.data[access.size], where


class SharedSpace(Space):
    """Shared memory of every block of the batch, watched by a Shadow."""

    name = "shared"

    def __init__(self, machine: Machine, size: int, granule: int, atomics: bool) -> None:
        super().__init__(machine)
        self.size, self.stride, self.granule = size, -(-max(size, 1) // 128) * 128, granule
        self.bytes = np.full(machine.blocks * self.stride, 0xFF, np.uint8)
        self.data = {n: self.bytes.view(RAW[n]) for n in RAW}
        self.base = machine.block_of * self.stride - SHARED_START
        self.warp_of = np.arange(machine.lanes) >> 5
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
            k = int(np.flatnonzero((offset < SHARED_START) | (offset + size > SHARED_START + self.size))[0])
            lane = int(lanes_of(self.machine, selection)[k])
            raise self.machine.error("out-of-bounds", ins, lane, f"{size} bytes at byte {int(offset[k]) - SHARED_START} of the block's "
                                                                 f"{self.size} bytes of shared memory")  # fmt: skip
        return offset + (self.base if selection is None else self.base[selection])

    def granules(self, where: np.ndarray, size: int) -> np.ndarray:
        return (where // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def warps(self, selection: Selection) -> np.ndarray:
        return self.warp_of if selection is None else self.warp_of[selection]

    def fault(
        self, kind: str, ins: Instruction, bad: np.ndarray, where: np.ndarray, selection: Selection, message: str
    ) -> None:
        k = int(np.flatnonzero(bad)[0])
        lane = int(lanes_of(self.machine, selection)[k])
        self.machine.fault(kind, ins, lane, f"byte {int(where[k]) % self.stride} of shared memory: {message}")

    def count(self, kind: str, access: Access, where: np.ndarray, selection: Selection, lanes: int = 0) -> None:
        """Count wavefronts. ``lanes`` served together: by default 32 up to 4 bytes a lane, 16 for 8 bytes, 8 for 16."""
        words = self.by_warp(where >> 2, selection)
        requests = int(np.count_nonzero(words.max(axis=1) >= 0))
        per_lane = max(access.size // 4, 1)
        if per_lane > 1:
            words = words[..., None] + np.where(words < 0, 0, 1)[..., None] * np.arange(per_lane)
        units, ideal = wavefronts(words.reshape(-1, 32))
        self.line(kind, access.ins).traffic.add(requests, len(where) * access.size, units, ideal)

    def load(self, access: Access, address: np.ndarray, selection: Selection, kind: str = "shared_load") -> np.ndarray:
        where = self.index(access.ins, access.size, address, selection)
        self.count(kind, access, where, selection)
        raw = self.data[access.size][where // access.size]
        granules, warps = self.granules(where, access.size), self.warps(selection)
        bad = self.shadow.unusable(granules)
        if bad is not None:
            poison(raw, bad)
            pending = self.shadow.pending(granules)
            if pending is not None:
                self.fault(
                    "async-not-waited",
                    access.ins,
                    pending,
                    where,
                    selection,
                    "read before the wait for the cp.async that fills it",
                )
            else:
                self.fault(
                    "uninitialised-shared", access.ins, bad, where, selection, "read before anything was written there"
                )
        elif not access.strong:
            racing = self.shadow.read(granules, warps)
            if racing is not None:
                poison(raw, racing)
                self.fault(
                    "shared-race",
                    access.ins,
                    racing,
                    where,
                    selection,
                    "read while another warp's write is not ordered by a barrier",
                )
        return raw

    def store(
        self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection, kind: str = "shared_store"
    ) -> None:
        where = self.index(access.ins, access.size, address, selection)
        self.count(kind, access, where, selection)
        granules, warps, data = self.granules(where, access.size), self.warps(selection), self.data[access.size]
        at = where // access.size
        same = data[at] == raw
        self.claim(access, granules, warps, where, selection, same)
        data[at] = raw
        clash = data[at] != raw
        if clash.any():
            self.fault(
                "shared-race", access.ins, clash, where, selection, "several threads store different values at once"
            )
            poison(data, at[clash])
        self.shadow.wrote(granules, warps)

    def claim(
        self,
        access: Access,
        granules: np.ndarray,
        warps: np.ndarray,
        where: np.ndarray,
        selection: Selection,
        same: np.ndarray | None,
    ) -> None:
        """Check that a write is ordered after every other warp's access; writing the value that is there already is no race."""
        pending = self.shadow.pending(granules)
        if pending is not None:
            self.fault(
                "async-not-waited",
                access.ins,
                pending,
                where,
                selection,
                "written while a cp.async that fills it was not waited for",
            )
        if access.strong:
            return
        writes, reads = self.shadow.write(granules, warps)
        if writes is not None and same is not None:
            writes = writes & ~same
        if writes is not None and writes.any():
            self.fault(
                "shared-race",
                access.ins,
                writes,
                where,
                selection,
                "written while another warp's write is not ordered by a barrier",
            )
        if reads is not None:
            self.fault(
                "shared-race",
                access.ins,
                reads,
                where,
                selection,
                "written while another warp may still read it: no barrier between",
            )

    def atomic(self, access: Access, address: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        where = self.index(access.ins, access.size, address, selection)
        self.count("shared_atomic", access, where, selection)
        granules = self.granules(where, access.size)
        bad = self.shadow.unusable(granules)
        if bad is not None:
            self.fault(
                "uninitialised-shared",
                access.ins,
                bad,
                where,
                selection,
                "an atomic on memory that nothing has written",
            )
        racing = self.shadow.atomic(granules, self.warps(selection))
        if racing is not None:
            self.fault(
                "shared-race",
                access.ins,
                racing,
                where,
                selection,
                "an atomic while another warp's access is not ordered by a barrier",
            )
        return self.data[access.size], where // access.size


class LocalSpace(Space):
    """Local memory: the stack of each lane, device-function parameters included."""

    name = "local"

    def __init__(self, machine: Machine, size: int) -> None:
        super().__init__(machine)
        self.size, self.stride = size, -(-max(size, 1) // 16) * 16
        self.bytes = np.full(machine.lanes * self.stride, 0xFF, np.uint8)
        self.data = {n: self.bytes.view(RAW[n]) for n in RAW}
        self.base = np.arange(machine.lanes) * self.stride - LOCAL_START

    def index(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        offset = address.astype(np.int64)
        self.aligned(access.ins, offset, access.size, selection)
        bad = (offset < LOCAL_START) | (offset + access.size > LOCAL_START + self.size)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            lane = int(lanes_of(self.machine, selection)[k])
            raise self.machine.error("out-of-bounds", access.ins, lane, f"{access.size} bytes at byte {int(offset[k]) - LOCAL_START} of the "
                                                                        f"thread's {self.size} bytes of local memory")  # fmt: skip
        return (offset + (self.base if selection is None else self.base[selection])) // access.size

    def load(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        return self.data[access.size][self.index(access, address, selection)]

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        self.data[access.size][self.index(access, address, selection)] = raw


class ConstSpace(Space):
    """Constant memory and kernel parameters."""

    name = "constant"

    def __init__(self, machine: Machine, content: bytes) -> None:
        super().__init__(machine)
        self.bytes = np.frombuffer(content + bytes(-len(content) % 16 + 16), np.uint8)
        self.data = {n: self.bytes.view(RAW[n]) for n in RAW}
        self.size = len(content)

    def load(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        offset = address.astype(np.int64) - CONST_START
        self.aligned(access.ins, offset, access.size, selection)
        bad = (offset < 0) | (offset + access.size > self.size)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            lane = int(lanes_of(self.machine, selection)[k])
            raise self.machine.error("out-of-bounds", access.ins, lane, f"{access.size} bytes at byte {int(offset[k])} of {self.size} bytes of "
                                                                        f"constant memory and parameters")  # fmt: skip
        return self.data[access.size][offset // access.size]

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        lane = int(lanes_of(self.machine, selection)[0])
        raise self.machine.error(
            "write-to-constant", access.ins, lane, "constant memory and kernel parameters cannot be written"
        )


class GenericSpace(Space):
    """Generic addresses: each lane's window decides."""

    name = "generic"

    def __init__(self, machine: Machine, spaces: dict[str, Space]) -> None:
        super().__init__(machine)
        self.spaces = spaces
        self.windows = (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW), ("const", CONST_WINDOW))

    def split(
        self, address: np.ndarray, selection: Selection
    ) -> list[tuple[Space, np.ndarray, np.ndarray | slice, Selection]]:
        """(space, addresses in it, positions among the lanes given, selection) for each space that is addressed."""
        address = address.astype(np.int64)
        if address.max() < SHARED_WINDOW:
            return [(self.spaces["global"], address, slice(None), selection)]
        parts, lanes = [], lanes_of(self.machine, selection)
        window = address >> 40 << 40
        for name, start in (("global", 0), *self.windows):
            at = np.flatnonzero(window == start if start else address < SHARED_WINDOW)
            if at.size == address.size:
                return [(self.spaces[name], address - start, slice(None), selection)]
            if at.size:
                parts.append((self.spaces[name], address[at] - start, at, lanes[at]))
        return parts

    def load(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        raw = np.empty(len(address), RAW[access.size])
        for space, inside, at, lanes in self.split(address, selection):
            raw[at] = space.load(access, inside, lanes)
        return raw

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        for space, inside, at, lanes in self.split(address, selection):
            space.store(access, inside, raw[at], lanes)
