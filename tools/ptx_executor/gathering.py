"""Instructions for which lanes of a warp must come together: lanes that are early wait for the others.

Source: PTX ISA, the .sync qualifier and its membermask; "bar.warp.sync".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import KernelFault
from .machine import Machine, Selection, lanes_of
from .program import Program
from .races import Clocks
from .warp_ops import member_mask

_TENSOR = {"ldmatrix", "stmatrix", "movmatrix", "mma", "wmma"}


class Gathering:
    """The lanes that wait at warp-synchronous steps. ``resume(step number, lanes)`` is called for those that may go on."""

    def __init__(self, machine: Machine, program: Program, clocks: Clocks, resume: Callable[[int, np.ndarray], None]) -> None:
        self.machine, self.steps, self.clocks, self.resume = machine, program.steps, clocks, resume
        self.masks: dict[int, np.ndarray | None] = {}
        self.parked: dict[int, np.ndarray] = {}

    def add(self, pc: int) -> None:
        """Note a step of this kind; its member mask is decoded here."""
        self.masks[pc] = member_mask(self.machine, self.steps[pc].ins)

    def arrive(self, pc: int, selection: Selection) -> Selection:
        """Lanes come to a step; those of them, and of the ones that wait there, that can carry it out now."""
        if selection is None and self.masks[pc] is None:
            return None
        lanes = lanes_of(self.machine, selection)
        if pc in self.parked:
            lanes = np.sort(np.concatenate([self.parked.pop(pc), lanes]))
        ready, waiting = self.complete(pc, lanes, [])
        if waiting.size:
            self.parked[pc] = waiting
        if self.steps[pc].ins.opcode in _TENSOR and len(ready) != 32 * len(np.unique(ready >> 5)):
            message = "needs all 32 lanes of the warp, and some have exited or never were"
            raise self.machine.error("member-mask", self.steps[pc].ins, int(ready[0]), message)
        return ready if len(ready) < self.machine.lanes else None

    def syncwarp(self, pc: int, selection: Selection) -> None:
        """bar.warp.sync, which the lanes of a mask may meet at different steps."""
        if selection is None and self.masks[pc] is None:
            self.clocks.advance(np.arange(self.machine.lanes // 32))
            return self.resume(pc + 1, np.arange(self.machine.lanes))
        self.parked[pc] = np.sort(np.concatenate([self.parked.get(pc, _NOBODY), lanes_of(self.machine, selection)]))
        here = [p for p in self.parked if self.steps[p].ins.opcode == "bar"]
        met = [self.parked[p] for p in here]
        results = [(p, *self.complete(p, self.parked[p], met)) for p in here]
        for place, ready, waiting in results:
            self.parked[place] = waiting
            if not waiting.size:
                del self.parked[place]
            if ready.size:
                self.clocks.advance(np.unique(ready >> 5))
                self.resume(place + 1, ready)
        return None

    def complete(self, pc: int, lanes: np.ndarray, others: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(lanes whose warp or member mask is complete, counting some others, and those that must wait)"""
        machine, ins = self.machine, self.steps[pc].ins
        present = np.zeros(machine.lanes, bool)
        for some in (lanes, *others):
            present[some] = True
        required = machine.alive.reshape(-1, 32)[lanes >> 5]
        mask = self.masks[pc]
        if mask is not None:
            bits = (mask[lanes, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)
            outside = ~np.take_along_axis(bits, (lanes & 31)[:, None], axis=1)[:, 0]
            if outside.any():
                lane = int(lanes[outside][0])
                message = f"lane {lane % 32} is not in its mask {mask[lane]:#x}"
                raise machine.error("member-mask", ins, lane, message)
            required = required & bits
        missing = (required & ~present.reshape(-1, 32)[lanes >> 5]).any(axis=1)
        return lanes[~missing], lanes[missing]

    def retry(self) -> None:
        """Let go the lanes whose missing partners have exited since."""
        waiting, self.parked = self.parked, {}
        for pc, lanes in waiting.items():
            if self.complete(pc, lanes, [])[0].size:
                self.resume(pc, lanes)
            else:
                self.parked[pc] = lanes

    def stuck(self) -> KernelFault:
        """The fault of lanes that wait for ever."""
        pc = min(self.parked)
        message = "waits for lanes of its member mask that never come here"
        return self.machine.error("member-mask", self.steps[pc].ins, int(self.parked[pc][0]), message)


_NOBODY = np.empty(0, np.int64)
