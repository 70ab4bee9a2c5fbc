"""Barriers of a block: who waits, when all have come, and whether whole warps came together.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions": bar, barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import KernelFault
from .machine import Machine, Selection, lanes_of
from .races import Clocks
from .shared import SharedSpace
from .syntax import Immediate, Instruction

IDS = 16  # barriers of a block


@dataclass
class BarrierStep:
    """A decoded barrier instruction."""

    ins: Instruction
    mode: str  # sync, arrive or red
    aligned: bool
    ids: np.ndarray
    counts: np.ndarray | None
    predicate: tuple[np.ndarray, bool] | None = None
    target: np.ndarray | None = None
    reduction: str = ""

    @property
    def plain(self) -> bool:
        """__syncthreads(): barrier 0 for all threads."""
        return self.mode == "sync" and self.counts is None and isinstance(self.ins.operands[0], Immediate)


def decode_barrier(machine: Machine, ins: Instruction) -> BarrierStep:
    """bar.sync, bar.arrive, bar.red and their barrier forms."""
    machine.instruction = ins
    mode = next((m for m in ins.modifiers if m in ("sync", "arrive", "red")), "")
    if not mode or "cluster" in ins.modifiers:
        raise machine.unsupported("unknown barrier")
    aligned = ins.opcode == "bar" or "aligned" in ins.modifiers
    operands, predicate, target, reduction = list(ins.operands), None, None, ""
    if mode == "red":
        reduction = next(m for m in ins.modifiers if m in ("popc", "and", "or"))
        target = machine.destination(operands.pop(0), "u32" if reduction == "popc" else "pred")
        predicate = machine.predicate(operands.pop())
    ids = machine.source(operands[0], "u32")
    counts = machine.source(operands[1], "u32") if len(operands) > 1 else None
    return BarrierStep(ins, mode, aligned, ids, counts, predicate, target, reduction)


class Barriers:
    """The barriers of every block of a batch. ``resume(step number, lanes)`` is called for lanes that may go on."""

    def __init__(self, machine: Machine, steps: dict[int, BarrierStep], resume: Callable[[int, np.ndarray], None]) -> None:
        self.machine, self.steps, self.resume = machine, steps, resume
        self.at = np.full(machine.lanes, -1, np.int64)  # the step at which a lane waits
        self.id_of = np.zeros(machine.lanes, np.int64)
        self.arrived = np.zeros((machine.blocks, IDS), np.int64)  # by bar.arrive
        self.expected = np.zeros((machine.blocks, IDS), np.int64)  # 0: all threads of the block
        self.joined: dict[tuple[int, int], np.ndarray] = {}  # clocks that bar.arrive brought
        self.weight = np.ones(machine.lanes, np.int64)  # a warp's padding counts as threads
        padding = machine.warps * 32 - machine.threads
        self.weight[np.flatnonzero(machine.exists).reshape(machine.blocks, -1)[:, -1]] += padding

    def reset(self) -> None:
        self.at[:] = -1
        self.arrived[:] = 0
        self.expected[:] = 0
        self.joined.clear()

    @property
    def clocks(self) -> Clocks:
        shared = self.machine.spaces["shared"]
        assert isinstance(shared, SharedSpace)
        return shared.clocks

    def arrive(self, pc: int, selection: Selection) -> bool:
        """Lanes come to a barrier. True where all of them may go on at once; else ``resume`` will be called for those
        that wait."""
        step, machine = self.steps[pc], self.machine
        if selection is None and step.plain and (self.at < 0).all() and not self.arrived.any():
            self.clocks.barrier()
            machine.counters.barriers += machine.blocks
            return True
        lanes = lanes_of(machine, selection)
        ids = step.ids[lanes].astype(np.int64)
        if ids.max() >= IDS:
            raise machine.error(
                "deadlock",
                step.ins,
                int(lanes[ids >= IDS][0]),
                f"barrier {int(ids.max())}: a block has barriers 0 to 15",
            )
        blocks = machine.block_of[lanes]
        if step.counts is not None:
            self.expected[blocks, ids] = step.counts[lanes]
        if step.mode == "arrive":
            np.add.at(self.arrived, (blocks, ids), self.weight[lanes])
            for block, number in set(zip(blocks.tolist(), ids.tolist(), strict=True)):
                warps = np.unique(lanes[(blocks == block) & (ids == number)] >> 5)
                joined = self.clocks.release(warps)
                self.joined[block, number] = np.maximum(joined, self.joined.get((block, number), np.int32(0)))
            self.release()
            return True
        self.at[lanes], self.id_of[lanes] = pc, ids
        self.release()
        return False

    def release(self) -> None:
        """Let go every barrier that is complete."""
        machine = self.machine
        waiting = np.flatnonzero(self.at >= 0)
        if not waiting.size:
            return
        key = machine.block_of[waiting] * IDS + self.id_of[waiting]
        shape = (machine.blocks, IDS)
        came = np.bincount(key, weights=self.weight[waiting], minlength=machine.blocks * IDS).reshape(shape) + self.arrived
        alive = np.bincount(machine.block_of[machine.alive], weights=self.weight[machine.alive], minlength=machine.blocks)[
            :, None
        ]
        present = np.bincount(key, minlength=machine.blocks * IDS).reshape(shape) > 0
        done = present & (came >= np.where(self.expected > 0, self.expected, alive))
        for block, number in np.argwhere(done):
            lanes = waiting[key == block * IDS + number]
            self.complete(int(block), int(number), lanes)

    def complete(self, block: int, number: int, lanes: np.ndarray) -> None:
        machine = self.machine
        warps = np.unique(lanes >> 5)
        together = self.at.reshape(-1, 32)[warps]
        exists = machine.exists.reshape(-1, 32)[warps]
        first = together[:, :1]
        split = ((together != first) & exists).any(axis=1)
        if split.any() and self.steps[int(self.at[lanes[0]])].aligned:
            raise self.divergent(int(lanes[lanes >> 5 == warps[split][0]][0]))
        joined = np.maximum(self.clocks.release(warps), self.joined.pop((block, number), np.int32(0)))
        self.clocks.acquire(warps, joined)
        machine.counters.barriers += 1
        self.arrived[block, number] = self.expected[block, number] = 0
        pcs = self.at[lanes]
        self.at[lanes] = -1
        self.reduce(pcs, lanes)
        for pc in np.unique(pcs):
            self.resume(int(pc) + 1, lanes[pcs == pc])

    def reduce(self, pcs: np.ndarray, lanes: np.ndarray) -> None:
        """bar.red: every thread of the barrier gets the reduction of all their predicates."""
        step = self.steps[int(pcs[0])]
        if step.mode != "red" or step.predicate is None or step.target is None:
            return
        source, negated = step.predicate
        votes = source[lanes] ^ negated
        results = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}
        step.target[lanes] = results[step.reduction]

    def divergent(self, lane: int) -> KernelFault:
        """The fault of a warp that did not come to a barrier together."""
        warp = slice(lane >> 5 << 5, (lane >> 5 << 5) + 32)
        same, threads = np.count_nonzero(self.at[warp] == self.at[lane]), np.count_nonzero(self.machine.exists[warp])
        message = f"only {same} of the {threads} threads of the warp came to this barrier together"
        return self.machine.error("divergent-barrier", self.steps[int(self.at[lane])].ins, lane, message)

    def stuck(self) -> KernelFault:
        """The fault that explains why the waiting lanes will wait for ever."""
        waiting = np.flatnonzero(self.at >= 0)
        rows, exists = self.at.reshape(-1, 32), self.machine.exists.reshape(-1, 32)
        lane = int(waiting[0])
        for first in waiting[np.unique(waiting >> 5, return_index=True)[1]].tolist():
            together = (rows[first >> 5] == self.at[first]) | ~exists[first >> 5]
            if not together.all() and self.steps[int(self.at[first])].aligned:
                return self.divergent(first)
        block, number = int(self.machine.block_of[lane]), int(self.id_of[lane])
        same = (self.machine.block_of[waiting] == block) & (self.id_of[waiting] == number)
        here = int(self.weight[waiting[same]].sum() + self.arrived[block, number])
        wanted = int(self.expected[block, number]) or self.machine.threads
        message = f"barrier {number} waits for {wanted} threads; {here} have come and no other thread can run"
        return self.machine.error("deadlock", self.steps[int(self.at[lane])].ins, lane, message)
