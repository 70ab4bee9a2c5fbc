"""Asynchronous copies to shared memory: the bytes land at the wait that covers them, not before.

Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy": cp.async, cp.async.commit_group,
cp.async.wait_group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .decode import Action, instruction
from .machine import Machine, Selection, lanes_of
from .memory_ops import effective_address
from .races import PENDING
from .shared import SharedSpace
from .spaces import Access, GlobalSpace
from .syntax import Address, Instruction, Not, Register


@dataclass
class _Copy:
    """One cp.async in flight: for each lane, its destination, its bytes and the number of its group."""

    lanes: np.ndarray
    where: np.ndarray
    granules: np.ndarray
    raw: np.ndarray
    group: np.ndarray


class AsyncCopies:
    """The copies in flight of a batch of blocks."""

    def __init__(self, machine: Machine, shared: SharedSpace) -> None:
        self.machine, self.shared = machine, shared
        self.committed = np.zeros(machine.lanes, np.int32)  # groups that each lane has committed
        self.flight: list[_Copy] = []

    def reset(self) -> None:
        self.committed[:] = 0
        self.flight.clear()

    def start(self, access: Access, where: np.ndarray, raw: np.ndarray, selection: Selection) -> None:
        """Claim the destinations and take the copy in flight."""
        shared, at = self.shared, where // access.size
        these = shared.accesses(access, where, selection)
        shared.claim(these, None)
        owner = np.empty(shared.bytes.size // access.size, np.int64)
        owner[at] = these.lanes
        clash = owner[at] != these.lanes
        if clash.any():
            shared.fault("shared-race", these, clash, "several threads copy to the same place at once")
        shared.shadow.state[these.granules] = PENDING
        self.flight.append(_Copy(these.lanes, at, these.granules, raw, self.committed[these.lanes]))

    def commit(self, selection: Selection) -> None:
        self.committed[slice(None) if selection is None else selection] += 1

    def wait(self, allowed: int | None, selection: Selection) -> None:
        """Deliver all but the last ``allowed`` committed groups of these lanes; None delivers the uncommitted too."""
        waiting = np.ones(self.machine.lanes, bool)
        if selection is not None:
            waiting[:] = False
            waiting[selection] = True
        remaining = []
        for copy in self.flight:
            done = waiting[copy.lanes]
            if allowed is not None:
                done = done & (copy.group < self.committed[copy.lanes] - allowed)
            if not done.all():
                kept = ~done
                remaining.append(
                    _Copy(copy.lanes[kept], copy.where[kept], copy.granules[kept], copy.raw[kept], copy.group[kept])
                )
            if done.any():
                self.deliver(copy, done)
        self.flight = remaining

    def deliver(self, copy: _Copy, done: np.ndarray) -> None:
        self.shared.data[copy.raw.dtype.itemsize][copy.where[done]] = copy.raw[done]
        self.shared.shadow.wrote(copy.granules[done], copy.lanes[done])


@instruction("cp")
def _cp(machine: Machine, ins: Instruction) -> Action:
    if ins.modifiers[0] != "async" or "bulk" in ins.modifiers or "mbarrier" in ins.modifiers:
        raise machine.unsupported("a copy other than cp.async with groups")
    copies = machine.copies
    if "commit_group" in ins.modifiers:
        return copies.commit
    if "wait_all" in ins.modifiers:
        return lambda selection: copies.wait(None, selection)
    if "wait_group" in ins.modifiers:
        allowed = int(ins.operands[0].value)
        return lambda selection: copies.wait(allowed, selection)
    return _copy(machine, ins)


def _copy(machine: Machine, ins: Instruction) -> Action:
    destination, source = ins.operands[:2]
    if not isinstance(destination, Address) or not isinstance(source, Address) or "shared" not in ins.modifiers:
        raise machine.unsupported("malformed cp.async")
    size = int(ins.operands[2].value)
    if size not in (4, 8, 16):
        raise machine.unsupported(f"cp.async of {size} bytes")
    given = ins.operands[3 : -1 if "L2::cache_hint" in ins.modifiers else None]
    ignore, ignored_if = None, False
    source_size = np.broadcast_to(np.int64(size), (machine.lanes,))
    if given and _is_predicate(machine, given[0]):
        ignore, ignored_if = machine.predicate(given[0])
    elif given:
        source_size = machine.source(given[0], "u32")
    to, to_offset = effective_address(machine, destination)
    at, at_offset = effective_address(machine, source)
    access, shared, memory = Access(ins, size), machine.spaces["shared"], machine.spaces["global"]
    assert isinstance(shared, SharedSpace)
    assert isinstance(memory, GlobalSpace)

    def run(selection: Selection) -> None:
        lanes = slice(None) if selection is None else selection
        where = shared.index(ins, size, to[lanes].astype(np.int64) + to_offset, selection)
        shared.count("cp_async_shared", access, where, selection)
        wanted = source_size[lanes].astype(np.int64)
        if ignore is not None:
            wanted = np.where(ignore[lanes] ^ ignored_if, 0, wanted)
        if wanted.max() > size:
            lane = int(lanes_of(machine, selection)[np.flatnonzero(wanted > size)[0]])
            raise machine.error(
                "out-of-bounds", ins, lane, f"the source size {int(wanted.max())} is more than the copy's {size} bytes"
            )
        raw = _gather(machine, access, at[lanes].astype(np.int64) + at_offset, wanted, selection, memory)
        machine.copies.start(access, where, raw, selection)

    return run


def _is_predicate(machine: Machine, operand: object) -> bool:
    if isinstance(operand, Not):
        return True
    return isinstance(operand, Register) and machine.storage(operand.name).dtype == np.bool_


def _gather(
    machine: Machine, access: Access, address: np.ndarray, wanted: np.ndarray, selection: Selection, memory: GlobalSpace
) -> np.ndarray:
    """The bytes of a copy: ``wanted`` from global memory, zeros after."""
    size = access.size
    if (wanted == size).all():
        return memory.load(access, address, selection, kind="cp_async_global")
    lanes = lanes_of(machine, selection)
    octets = np.zeros((len(address), size), np.uint8)
    some = np.flatnonzero(wanted > 0)
    if some.size:
        memory.aligned(access.ins, address[some], size, lanes[some])
        missing = int((size - wanted[some]).sum())
        memory.count("cp_async_global", access, address[some], lanes[some], missing)
        whole = np.flatnonzero(wanted == size)
        if whole.size:
            octets[whole] = memory.fetch(access, address[whole], lanes[whole]).view(np.uint8).reshape(-1, size)
        for k in range(size if missing else 0):
            part = np.flatnonzero((wanted > k) & (wanted < size))
            if part.size:
                octets[part, k] = memory.fetch(Access(access.ins, 1), address[part] + k, lanes[part])
    return octets.view(memory.data[size].dtype).reshape(-1)
