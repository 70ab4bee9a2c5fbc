"""The state spaces: checked loads and stores of global, shared, local and constant memory, and of generic addresses.

Source: PTX ISA, "State Spaces, Types, and Variables" and "Generic Addressing".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .counters import Line, sectors
from .errors import KernelFault
from .machine import (
    CONST_START,
    CONST_WINDOW,
    LOCAL_START,
    LOCAL_WINDOW,
    SHARED_WINDOW,
    Machine,
    Selection,
    lanes_of,
)
from .memory import GLOBAL_BASE, READ_NOW, VALID, WRITTEN, WRITTEN_NOW, Memory
from .races import BlockRaces
from .syntax import Instruction

RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}
ONES = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


@dataclass
class Access:
    """One memory instruction: bytes for each lane, where its traffic is counted, and whether it is an atomic or
    volatile one."""

    ins: Instruction
    size: int
    strong: bool = False


def poison(raw: np.ndarray, at: np.ndarray) -> None:
    """Overwrite items with all-ones bytes: NaN in every floating-point format."""
    raw[at] = np.full(raw.dtype.itemsize, 0xFF, np.uint8).view(raw.dtype)[0]


class Space:
    """A memory that lanes access; subclasses check an address and turn it into an index of ``data``."""

    name = ""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def load(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        """What the lanes of a selection read at their addresses, one item of the access size for each."""
        raise NotImplementedError

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        """Write one item for each lane of a selection."""
        raise NotImplementedError

    def atomic(self, access: Access, address: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        """The memory in units of the access size, and the index of each lane's word in it."""
        lane = int(lanes_of(self.machine, selection)[0])
        raise self.machine.error("out-of-bounds", access.ins, lane, f"an atomic on {self.name} memory")

    def line(self, kind: str, ins: Instruction) -> Line:
        return self.machine.counters.lines.setdefault((ins.line, kind), Line(kind, ins.text, ins.source))

    def aligned(self, ins: Instruction, offset: np.ndarray, size: int, selection: Selection) -> None:
        odd = offset & (size - 1)
        if odd.any():
            at = int(offset[np.flatnonzero(odd)[0]])
            message = f"{self.name} address {at:#x} is not a multiple of the {size} bytes that are accessed"
            raise self.error("misaligned", ins, odd != 0, selection, message)

    def error(self, kind: str, ins: Instruction, bad: np.ndarray, selection: Selection, message: str) -> KernelFault:
        """The fault of the first lane of a selection that did wrong."""
        lane = int(lanes_of(self.machine, selection)[np.flatnonzero(bad)[0]])
        return self.machine.error(kind, ins, lane, message)

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

    def __init__(self, machine: Machine, memory: Memory, races: BlockRaces | None) -> None:
        super().__init__(machine)
        self.memory, self.races = memory, races
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
            raise self.out_of_bounds(ins, address, (offset < 0) | (offset >= self.limit), size, selection)
        where = offset // unit if size <= 8 else (offset >> 3)[:, None] + np.arange(2)
        state, ones = self.state[unit], self.state[unit].dtype.type(ONES[unit])
        seen = state[where]
        full = ones * state.dtype.type(need | mark)
        if ((seen & full) != full).any():
            valid, wanted = ones * state.dtype.type(VALID), ones * state.dtype.type(need)
            outside = ((seen & valid) != valid).reshape(len(offset), -1).any(axis=1)
            if outside.any():
                raise self.out_of_bounds(ins, address, outside, size, selection)
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
    ) -> KernelFault:
        where = self.memory.describe(int(address[np.flatnonzero(bad)[0]]))
        return self.error("out-of-bounds", ins, bad, selection, f"{size} bytes of global memory: {where}")

    def count(self, kind: str, access: Access, address: np.ndarray, selection: Selection, missing: int = 0) -> None:
        """Count a request of which ``missing`` bytes are not asked for."""
        rows = self.by_warp(address.astype(np.int64), selection)
        requests, units, ideal = sectors(rows, access.size, GLOBAL_BASE)
        self.line(kind, access.ins).traffic.add(requests, len(address) * access.size - missing, units, ideal - missing / 32)

    def fetch(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        where = self.index(access, address, selection, VALID | WRITTEN, READ_NOW)
        raw = self.data[access.size][where]
        if self.races is not None:
            blocks = self.blocks(selection)
            if access.strong:
                self.races.ordered[blocks] = True
            racing = self.races.read(self.races.granules(where * access.size, access.size), blocks)
            if racing is not None and racing.any():
                poison(raw, racing)
                self.race(access, address, racing, selection, "read, and another block writes it in this launch")
        return raw

    def blocks(self, selection: Selection) -> np.ndarray:
        """The linear number, in the grid, of the block of each lane."""
        within = self.machine.block_of if selection is None else self.machine.block_of[selection]
        return within + self.machine.first_block

    def race(self, access: Access, address: np.ndarray, bad: np.ndarray, selection: Selection, message: str) -> None:
        k = int(np.flatnonzero(bad)[0])
        lane = int(lanes_of(self.machine, selection)[k])
        self.machine.fault("global-race", access.ins, lane, f"{self.memory.describe(int(address[k]))}: {message}")

    def load(self, access: Access, address: np.ndarray, selection: Selection, kind: str = "global_load") -> np.ndarray:
        self.count(kind, access, address, selection)
        return self.fetch(access, address, selection)

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        where = self.index(access, address, selection, VALID, WRITTEN | WRITTEN_NOW)
        self.count("global_store", access, address, selection)
        data = self.data[access.size]
        changes = data[where] != raw
        data[where] = raw
        clash = data[where] != raw
        if clash.any():
            poison(data, where[clash])
            self.race(access, address, clash, selection, "several threads store different values at once")
        if self.races is not None and not access.strong:
            racing = self.races.write(self.races.granules(where * access.size, access.size), self.blocks(selection))
            if racing is not None and (racing & changes).any():
                poison(data, where[racing & changes])
                self.race(access, address, racing & changes, selection, "written, and another block reads or writes it too")

    def atomic(self, access: Access, address: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        where = self.index(access, address, selection, VALID | WRITTEN, READ_NOW | WRITTEN_NOW)
        self.count("global_atomic", access, address, selection)
        self.order(selection)
        return self.data[access.size], where

    def order(self, selection: Selection) -> None:
        """The lanes' blocks may have ordered themselves among the others."""
        if self.races is not None:
            self.races.ordered[self.blocks(selection)] = True


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
            at = int(offset[np.flatnonzero(bad)[0]]) - LOCAL_START
            message = f"{access.size} bytes at byte {at} of the thread's {self.size} bytes of local memory"
            raise self.error("out-of-bounds", access.ins, bad, selection, message)
        return (offset + (self.base if selection is None else self.base[selection])) // access.size

    def load(self, access: Access, address: np.ndarray, selection: Selection) -> np.ndarray:
        return self.data[access.size][self.index(access, address, selection)]

    def store(self, access: Access, address: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        self.data[access.size][self.index(access, address, selection)] = raw

    def reset(self) -> None:
        self.bytes[:] = 0xFF

    def read(self, address: int, size: int, lanes: np.ndarray) -> np.ndarray:
        """The bytes of one variable of each lane."""
        return self.bytes.reshape(self.machine.lanes, -1)[lanes, address - LOCAL_START : address - LOCAL_START + size]

    def write(self, address: int, content: np.ndarray, lanes: np.ndarray) -> None:
        start = address - LOCAL_START
        self.bytes.reshape(self.machine.lanes, -1)[lanes, start : start + content.shape[1]] = content


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
            at = int(offset[np.flatnonzero(bad)[0]])
            message = f"{access.size} bytes at byte {at} of {self.size} bytes of constant memory and parameters"
            raise self.error("out-of-bounds", access.ins, bad, selection, message)
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

    def split(self, address: np.ndarray, selection: Selection) -> list[tuple[Space, np.ndarray, np.ndarray | slice, Selection]]:
        """(space, addresses in it, positions among the lanes given, selection) for each space that is addressed."""
        address = address.astype(np.int64)
        if address.max() < SHARED_WINDOW:
            return [(self.spaces["global"], address, slice(None), selection)]
        lanes = lanes_of(self.machine, selection)
        parts: list[tuple[Space, np.ndarray, np.ndarray | slice, Selection]] = []
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
