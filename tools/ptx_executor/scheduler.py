"""Running a program: lanes at one step form a group, the lowest step runs first, groups that meet become one.

Source: PTX ISA, "Control Flow Instructions", and "Independent Thread Scheduling" of the CUDA C++ Programming Guide.
"""

from __future__ import annotations

import numpy as np

from .barriers import Barriers, BarrierStep, decode_barrier
from .calls import Calls
from .decode import WARP_SYNCHRONOUS, Action, decode
from .gathering import Gathering
from .machine import Machine, Selection, lanes_of
from .memory_ops import STRONG
from .program import Program, Step
from .shared import SharedSpace
from .syntax import Instruction

_CONTROL = {"bra", "brx", "call", "ret", "exit", "trap", "bar", "barrier"}
# A spin lock needs that now and then another group than the lowest runs: after so many turns, for so many. An iteration
# of a loop that looks like one, and that no lane left, counts for more.
_PATIENCE, _FAVOUR, _SPIN = 1000, 64, 100
_NOBODY = np.empty(0, np.int64)


class Scheduler:
    """Executes one program on one machine, batch after batch."""

    def __init__(self, machine: Machine, program: Program, max_turns: int) -> None:
        self.machine, self.program, self.max_turns = machine, program, max_turns
        shared = machine.spaces["shared"]
        assert isinstance(shared, SharedSpace)
        self.calls = Calls(machine, program)
        self.gathering = Gathering(machine, program, shared.clocks, self.join)
        count = len(program.steps)
        self.warps_issued = np.zeros(count + 1, np.int64)  # differences: runs of steps add at their ends
        self.lanes_issued = np.zeros(count + 1, np.int64)
        self.lanes_skipped = np.zeros(count + 1, np.int64)  # by the guard predicate
        self.guards: list[tuple[np.ndarray, bool] | None] = []
        self.actions: list[Action] = []
        barrier_steps: dict[int, BarrierStep] = {}
        for pc, step in enumerate(program.steps):
            machine.function, machine.instruction, ins = step.function, step.ins, step.ins
            self.guards.append((machine.storage(ins.guard.name), ins.guard_negated) if ins.guard else None)
            action: Action = _nothing
            if _is_syncwarp(ins):
                self.gathering.add(pc)
            elif ins.opcode in ("bar", "barrier"):
                barrier_steps[pc] = decode_barrier(machine, ins)
            elif ins.opcode in WARP_SYNCHRONOUS:
                self.gathering.add(pc)
                action = decode(machine, ins)
            elif ins.opcode not in _CONTROL:
                action = self.guarded(pc, decode(machine, ins))
            self.actions.append(action)
        self.barriers = Barriers(machine, barrier_steps, self.join)
        special = _CONTROL | WARP_SYNCHRONOUS
        ends = np.array([*(pc for pc, s in enumerate(program.steps) if s.ins.opcode in special), count])
        self.segment_end = ends[np.searchsorted(ends, np.arange(count + 1))].tolist()
        # the branches that close a loop which may spin, and how many lanes took each last
        self.spinning = {pc: 0 for pc, step in enumerate(program.steps) if self.may_spin(pc, step)}
        self.groups: dict[int, Selection] = {}
        self.turns = 0  # of the running batch
        self.waited = 0  # turns of the lowest group while another waited

    def guarded(self, pc: int, action: Action) -> Action:
        """The action for the lanes whose guard predicate holds."""
        guard = self.guards[pc]
        if guard is None:
            return action
        predicate, negated = guard
        skipped = self.lanes_skipped

        def run(selection: Selection) -> None:
            flags = predicate if selection is None else predicate[selection]
            chosen = np.flatnonzero(flags ^ negated)
            skipped[pc] += len(flags) - len(chosen)
            if len(chosen) == len(flags):
                action(selection)
            elif len(chosen):
                action(chosen if selection is None else selection[chosen])

        return run

    def may_spin(self, pc: int, step: Step) -> bool:
        """Whether a step closes a loop that waits for what another thread writes."""
        if step.ins.opcode != "bra":
            return False
        start = self.program.labels[step.function.name, step.ins.operands[0].name]
        return any(
            (s.ins.opcode == "atom" and ("cas" in s.ins.modifiers or "exch" in s.ins.modifiers))
            or (s.ins.opcode == "ld" and not STRONG.isdisjoint(s.ins.modifiers))
            for s in self.program.steps[start:pc]
        )

    def spin(self, pc: int, lanes: int) -> None:
        """A loop that may spin goes round: it does spin if no lane has left it since the last time."""
        if lanes >= self.spinning[pc]:
            self.waited += _SPIN
        self.spinning[pc] = lanes

    # ---- groups ----------------------------------------------------------------------------------------------------
    def join(self, pc: int, selection: Selection) -> None:
        """Add lanes to the group at a step."""
        if selection is not None and pc in self.groups:
            other = self.groups[pc]
            assert other is not None, "a group of all lanes leaves none to join it"
            selection = np.sort(np.concatenate([other, selection]))
        if selection is not None and len(selection) == self.machine.lanes:
            selection = None
        self.groups[pc] = selection

    def run(self) -> None:
        """Run the batch to its end."""
        self.barriers.reset()
        self.calls.reset()
        self.gathering.parked.clear()
        self.groups.clear()
        self.turns = self.waited = 0
        self.join(0, np.flatnonzero(self.machine.exists))
        while True:
            if not self.groups and not self.wake():
                return
            if len(self.groups) == 1 or self.waited >= _PATIENCE + _FAVOUR:
                self.waited = 0
            favoured = self.waited >= _PATIENCE
            pc = max(self.groups) if favoured else min(self.groups)
            self.run_group(pc, self.groups.pop(pc), favoured)

    def wake(self) -> bool:
        """With no group left to run: go on where an exit has made that possible; False at the end of the batch."""
        self.barriers.release()
        if not self.groups:
            self.gathering.retry()
        if self.groups:
            return True
        if (self.barriers.at >= 0).any():
            raise self.barriers.stuck()
        if self.gathering.parked:
            raise self.gathering.stuck()
        return False

    def run_group(self, pc: int, selection: Selection, favoured: bool) -> None:
        """Run a group until it meets another, splits, waits, ends or has had its turns."""
        beyond = len(self.actions) + 1
        turns = _PATIENCE + _FAVOUR if favoured else _PATIENCE
        stop = beyond if favoured else min(self.groups, default=beyond)
        while True:
            self.count_turn(pc, selection)
            end = self.segment_end[pc]
            if pc < stop < end:
                end = stop
            if pc < end:
                for action in self.actions[pc:end]:
                    action(selection)
                self.issued(pc, end, selection)
                pc = end
            if pc == stop:
                return self.join(pc, selection)
            if pc >= len(self.actions):
                message = "the kernel ran past its last instruction"
                raise self.machine.error("trap", self.program.steps[-1].ins, None, message)
            self.issued(pc, pc + 1, selection)
            going = self.control(pc, selection)
            if going is None:
                return None
            pc, selection = going
            stop = beyond if favoured else min(self.groups, default=beyond)
            self.waited += 1
            if pc >= stop or pc in self.groups or (self.groups and self.waited >= turns):
                return self.join(pc, selection)

    def count_turn(self, pc: int, selection: Selection) -> None:
        self.turns += 1
        self.machine.clock += np.uint64(32)
        if self.turns > self.max_turns:
            lane = int(lanes_of(self.machine, selection)[0])
            message = f"still running after {self.max_turns} turns; raise max_turns if the kernel should run so long"
            raise self.machine.error("endless-loop", self.program.steps[pc].ins, lane, message)

    def issued(self, start: int, end: int, selection: Selection) -> None:
        """Count a run of steps for a group."""
        if selection is None:
            lanes, warps = self.machine.lanes, self.machine.lanes // 32
        else:
            lanes, warps = len(selection), 1 + int(np.count_nonzero(np.diff(selection >> 5)))
        self.warps_issued[start] += warps
        self.warps_issued[end] -= warps
        self.lanes_issued[start] += lanes
        self.lanes_issued[end] -= lanes

    # ---- control flow ----------------------------------------------------------------------------------------------
    def split(self, pc: int, selection: Selection) -> tuple[Selection, Selection]:
        """The lanes whose guard holds, and the others."""
        guard = self.guards[pc]
        if guard is None:
            return selection, _NOBODY
        flags = (guard[0] if selection is None else guard[0][selection]) ^ guard[1]
        count = np.count_nonzero(flags)
        if count == len(flags):
            return selection, _NOBODY
        if count == 0:
            return _NOBODY, selection
        yes, no = np.flatnonzero(flags), np.flatnonzero(~flags)
        return (yes, no) if selection is None else (selection[yes], selection[no])

    def control(self, pc: int, selection: Selection) -> tuple[int, Selection] | None:
        """Run a step that may move, split or block its lanes: where the group goes on, or None."""
        step = self.program.steps[pc]
        going, staying = self.split(pc, selection)
        if _empty(going):
            onward: tuple[int, Selection] | None = None
        elif step.ins.opcode == "bra":
            onward = self.program.labels[step.function.name, step.ins.operands[0].name], going
            if pc in self.spinning:
                self.spin(pc, len(lanes_of(self.machine, going)))
        else:
            onward = self.flow(pc, step, going)
        if _empty(staying):
            return onward
        if step.ins.opcode != "bra":  # a branch is executed by those who do not take it, too
            self.lanes_skipped[pc] += len(lanes_of(self.machine, staying))
        if _empty(going):
            return pc + 1, staying
        self.join(pc + 1, staying)
        if onward is not None:
            self.join(*onward)
        return None

    def flow(self, pc: int, step: Step, selection: Selection) -> tuple[int, Selection] | None:
        """A control step for the lanes whose guard holds."""
        op, machine = step.ins.opcode, self.machine
        if _is_syncwarp(step.ins):
            self.gathering.syncwarp(pc, selection)
        elif op in WARP_SYNCHRONOUS:
            ready = self.gathering.arrive(pc, selection)
            if not _empty(ready):
                self.actions[pc](ready)
                return pc + 1, ready
        elif op in ("bar", "barrier"):
            return (pc + 1, selection) if self.barriers.arrive(pc, selection) else None
        elif op == "exit" or (op == "ret" and step.function is self.program.kernel):
            machine.alive[slice(None) if selection is None else selection] = False
            self.barriers.release()
        elif op == "call":
            return self.calls.call(pc, step, selection), selection
        elif op == "ret":
            for target, lanes in self.calls.ret(step, selection):
                self.join(target, lanes)
        elif op == "brx":
            self.branch_table(step, lanes_of(machine, selection))
        else:
            raise machine.error("trap", step.ins, int(lanes_of(machine, selection)[0]), "the kernel executed trap")
        return None

    def branch_table(self, step: Step, lanes: np.ndarray) -> None:
        """brx.idx: each lane's index chooses its target."""
        self.machine.function, self.machine.instruction = step.function, step.ins
        labels = step.function.branch_tables[step.ins.operands[1].name]
        index = self.machine.source(step.ins.operands[0], "u32")[lanes]
        if index.max() >= len(labels):
            message = f"index {int(index.max())} of a branch table with {len(labels)} targets"
            raise self.machine.error("out-of-bounds", step.ins, int(lanes[index.argmax()]), message)
        for k in np.unique(index):
            self.join(self.program.labels[step.function.name, labels[k]], lanes[index == k])


def _is_syncwarp(ins: Instruction) -> bool:
    return ins.opcode == "bar" and "warp" in ins.modifiers


def _empty(selection: Selection) -> bool:
    return selection is not None and not selection.size


def _nothing(selection: Selection) -> None:
    """The action of steps that the scheduler carries out itself."""
