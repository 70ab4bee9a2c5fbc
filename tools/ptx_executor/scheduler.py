"""Running a program: lanes at one step form a group, the lowest step runs first, groups that meet become one.

Source: PTX ISA, "Control Flow Instructions", and "Independent Thread Scheduling" of the CUDA C++ Programming Guide.
"""

from __future__ import annotations

import numpy as np

from .barriers import Barriers, BarrierStep, decode_barrier
from .decode import WARP_SYNCHRONOUS, Action, decode
from .errors import UnsupportedInstruction
from .machine import Machine, Selection, lanes_of
from .memory_ops import STRONG
from .parser import Symbol, Vector
from .printf import format_message
from .program import Program, Step
from .warp_ops import member_mask

_CONTROL = {"bra", "brx", "call", "ret", "exit", "trap", "bar", "barrier"}
_TENSOR = {"ldmatrix", "stmatrix", "movmatrix", "mma", "wmma"}
# A spin lock needs that now and then another group than the lowest runs: after so many turns, for so many. An iteration of a
# loop that looks like one counts for more.
_PATIENCE, _FAVOUR, _SPIN = 1000, 64, 100


class Scheduler:
    """Executes one program on one machine, batch after batch."""

    def __init__(self, machine: Machine, program: Program, max_turns: int) -> None:
        self.machine, self.program, self.max_turns = machine, program, max_turns
        count = len(program.steps)
        self.actions: list[Action] = []
        self.guards: list[tuple[np.ndarray, bool] | None] = []
        self.masks: dict[int, np.ndarray | None] = {}
        barrier_steps: dict[int, BarrierStep] = {}
        self.warps_issued = np.zeros(count + 1, np.int64)  # differences: runs of steps add at their ends
        self.lanes_issued = np.zeros(count + 1, np.int64)
        self.lanes_skipped = np.zeros(count + 1, np.int64)  # by the guard predicate
        self.turns = 0
        self.waited = 0  # turns of the lowest group while another waited
        for pc, step in enumerate(program.steps):
            machine.function, machine.instruction, ins = step.function, step.ins, step.ins
            self.guards.append((machine.storage(ins.guard.name), ins.guard_negated) if ins.guard else None)
            action: Action = _nothing
            if (ins.opcode in ("bar", "barrier") and "warp" in ins.modifiers) or ins.opcode in WARP_SYNCHRONOUS:
                action = _nothing if ins.opcode in ("bar", "barrier") else decode(machine, ins)
                self.masks[pc] = member_mask(machine, ins)
            elif ins.opcode in ("bar", "barrier"):
                barrier_steps[pc] = decode_barrier(machine, ins)
            elif ins.opcode not in _CONTROL:
                action = self.guarded(pc, decode(machine, ins))
            self.actions.append(action)
        self.barriers = Barriers(machine, barrier_steps, self.join)
        flow = [
            pc for pc, s in enumerate(program.steps) if s.ins.opcode in _CONTROL or s.ins.opcode in WARP_SYNCHRONOUS
        ]
        ends = np.array([*flow, count])
        self.segment_end = ends[np.searchsorted(ends, np.arange(count + 1))].tolist()
        self.spinning = {pc for pc, step in enumerate(program.steps) if self.may_spin(pc, step)}
        self.groups: dict[int, Selection] = {}
        self.parked: dict[int, np.ndarray] = {}
        self.depth = np.zeros(machine.lanes, np.int64)
        self.returns = np.zeros((8, machine.lanes), np.int64)

    def guarded(self, pc: int, action: Action) -> Action:
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

    # ---- groups ----------------------------------------------------------------------------------------------------
    def join(self, pc: int, selection: Selection) -> None:
        """Add lanes to the group at a step."""
        if pc in self.groups and selection is not None:
            other = self.groups[pc]
            assert other is not None, "a group of all lanes leaves none to join it"
            selection = np.sort(np.concatenate([other, selection]))
        if selection is not None and len(selection) == self.machine.lanes:
            selection = None
        self.groups[pc] = selection

    def run(self) -> None:
        """Run the batch to its end."""
        machine = self.machine
        self.barriers.reset()
        self.depth[:] = 0
        self.parked.clear()
        self.groups.clear()
        self.join(0, np.flatnonzero(machine.exists))
        self.waited = 0
        while True:
            if not self.groups and not self.wake():
                return
            if len(self.groups) == 1 or self.waited >= _PATIENCE + _FAVOUR:
                self.waited = 0
            favoured = self.waited >= _PATIENCE
            pc = max(self.groups) if favoured else min(self.groups)
            self.run_group(pc, self.groups.pop(pc), favoured)

    def wake(self) -> bool:
        """With no group left to run: False at the end of the batch; else retry what an exit may have unblocked, or
        explain."""
        self.barriers.release()
        if self.groups:
            return True
        if self.parked:
            before, self.parked = self.parked, {}
            for pc, lanes in before.items():
                ready, _ = self.complete(pc, lanes)
                if ready.size:
                    self.join(pc, lanes)
                else:
                    self.parked[pc] = lanes
            if self.groups:
                return True
            if (self.barriers.at >= 0).any():
                raise self.barriers.stuck()
            pc = min(self.parked)
            step = self.program.steps[pc]
            raise self.machine.error(
                "member-mask",
                step.ins,
                int(self.parked[pc][0]),
                "waits for lanes of its member mask that never come here",
            )
        if (self.barriers.at >= 0).any():
            raise self.barriers.stuck()
        return False

    def run_group(self, pc: int, selection: Selection, favoured: bool) -> None:
        """Run a group until it meets another, splits, waits, ends or has had its turns."""
        beyond = len(self.actions) + 1
        turns = _PATIENCE + _FAVOUR if favoured else _PATIENCE
        stop = beyond if favoured else min(self.groups, default=beyond)
        while True:
            self.turns += 1
            self.machine.clock += np.uint64(32)
            if self.turns > self.max_turns:
                step = self.program.steps[pc]
                lane = int(lanes_of(self.machine, selection)[0])
                message = (
                    f"still running after {self.max_turns} turns; raise max_turns if the kernel should run so long"
                )
                raise self.machine.error("endless-loop", step.ins, lane, message)
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
                raise self.machine.error(
                    "trap", self.program.steps[-1].ins, None, "the kernel ran past its last instruction"
                )
            self.issued(pc, pc + 1, selection)
            going = self.control(pc, selection)
            if going is None:
                return None
            pc, selection = going
            stop = beyond if favoured else min(self.groups, default=beyond)
            self.waited += 1
            if pc >= stop or pc in self.groups or (self.groups and self.waited >= turns):
                return self.join(pc, selection)

    def issued(self, start: int, end: int, selection: Selection) -> None:
        if selection is None:
            lanes, warps = self.machine.lanes, self.machine.lanes // 32
        else:
            lanes, warps = len(selection), 1 + int(np.count_nonzero(np.diff(selection >> 5)))
        self.warps_issued[start] += warps
        self.warps_issued[end] -= warps
        self.lanes_issued[start] += lanes
        self.lanes_issued[end] -= lanes

    # ---- control flow ----------------------------------------------------------------------------------------------
    def split(self, pc: int, selection: Selection) -> tuple[Selection | bool, Selection | bool]:
        """(lanes whose guard holds, the others); False where there are none."""
        guard = self.guards[pc]
        if guard is None:
            return selection, False
        flags = (guard[0] if selection is None else guard[0][selection]) ^ guard[1]
        count = np.count_nonzero(flags)
        self.lanes_skipped[pc] += len(flags) - count
        if count == len(flags):
            return selection, False
        if count == 0:
            return False, selection
        yes, no = np.flatnonzero(flags), np.flatnonzero(~flags)
        return (yes, no) if selection is None else (selection[yes], selection[no])

    def control(self, pc: int, selection: Selection) -> tuple[int, Selection] | None:
        """Run a step that may move, split or block its lanes: where the group goes on, or None."""
        step = self.program.steps[pc]
        going, staying = self.split(pc, selection)
        if step.ins.opcode == "bra":
            self.lanes_skipped[pc] = 0  # a branch is executed by those who do not take it, too
            target = self.program.labels[step.function.name, step.ins.operands[0].name]
            if pc in self.spinning:
                self.waited += _SPIN
            if isinstance(staying, bool):
                return target, going  # type: ignore[return-value]
            if isinstance(going, bool):
                return pc + 1, staying
            self.join(target, going)
            self.join(pc + 1, staying)
            return None
        if isinstance(going, bool):
            return pc + 1, staying  # type: ignore[return-value]
        if not isinstance(staying, bool):
            self.join(pc + 1, staying)
        onward = self.flow(pc, step, going)
        if onward is not None and not isinstance(staying, bool):
            self.join(*onward)
            return None
        return onward

    def flow(self, pc: int, step: Step, selection: Selection) -> tuple[int, Selection] | None:
        op, machine = step.ins.opcode, self.machine
        if pc in self.masks:
            return self.warp_step(pc, selection)
        if op in ("bar", "barrier"):
            return (pc + 1, selection) if self.barriers.arrive(pc, selection) else None
        if op == "exit" or (op == "ret" and step.function is self.program.kernel):
            machine.alive[slice(None) if selection is None else selection] = False
            self.barriers.release()
            return None
        if op == "trap":
            raise machine.error("trap", step.ins, int(lanes_of(machine, selection)[0]), "the kernel executed trap")
        lanes = lanes_of(machine, selection)
        if op == "call":
            return self.call(pc, step, selection, lanes)
        if op == "ret":
            self.depth[lanes] -= 1
            targets = self.returns[self.depth[lanes], lanes]
        else:  # brx.idx
            machine.function, machine.instruction = step.function, step.ins
            table = [
                self.program.labels[step.function.name, n]
                for n in step.function.branch_tables[step.ins.operands[1].name]
            ]
            index = machine.source(step.ins.operands[0], "u32")[lanes]
            if index.max() >= len(table):
                message = f"index {int(index.max())} of a branch table with {len(table)} targets"
                raise machine.error("out-of-bounds", step.ins, int(lanes[index.argmax()]), message)
            targets = np.array(table)[index]
        for target in np.unique(targets):
            there = lanes[targets == target]
            if op == "ret":
                self.copy_results(int(target) - 1, step, there)
            self.join(int(target), there)
        return None

    # ---- device functions ------------------------------------------------------------------------------------------
    def call(self, pc: int, step: Step, selection: Selection, lanes: np.ndarray) -> tuple[int, Selection]:
        name, arguments = _callee(step)
        if name not in self.program.entry:
            if name == "vprintf":
                self.print(arguments, step, lanes)
                return pc + 1, selection
            if name == "__assertfail":
                raise self.machine.error("trap", step.ins, int(lanes[0]), "an assertion failed")
            raise UnsupportedInstruction(
                step.function.name, step.ins.line, step.ins.text, f"a call of {name}, which the PTX does not define"
            )
        entry = self.program.entry[name]
        callee = self.program.steps[entry].function
        for variable, argument in zip(callee.parameters, arguments, strict=True):
            self.copy_local(argument, variable.name, variable.size, lanes)
        if self.depth[lanes].max() >= len(self.returns):
            raise self.machine.error(
                "trap",
                step.ins,
                int(lanes[0]),
                f"calls are nested deeper than {len(self.returns)}; recursion is not supported",
            )
        self.returns[self.depth[lanes], lanes] = pc + 1
        self.depth[lanes] += 1
        return entry, selection

    def print(self, arguments: list[str], step: Step, lanes: np.ndarray) -> None:
        local = self.machine.spaces["local"]
        values = [local.read(self.program.local[a], 8, lanes).view(np.uint64).reshape(-1) for a in arguments]
        for lane, text, packed in zip(lanes.tolist(), *(v.tolist() for v in values), strict=True):
            self.machine.counters.printed.append(format_message(self.machine, text, packed, lane))
        results = step.ins.operands[0]
        if isinstance(results, Vector):
            local.write(self.program.local[results.elements[0].name], np.zeros((len(lanes), 4), np.uint8), lanes)

    def copy_results(self, call_pc: int, step: Step, lanes: np.ndarray) -> None:
        results = self.program.steps[call_pc].ins.operands[0]
        if isinstance(results, Vector):
            for variable, target in zip(step.function.results, results.elements, strict=True):
                self.copy_local(variable.name, target.name, variable.size, lanes)

    def copy_local(self, source: str, target: str, size: int, lanes: np.ndarray) -> None:
        local = self.machine.spaces["local"]
        local.write(self.program.local[target], local.read(self.program.local[source], size, lanes), lanes)

    # ---- lanes of a warp that must come together -------------------------------------------------------------------
    def complete(self, pc: int, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lanes whose warp or member mask is complete, those that must wait)"""
        machine, step = self.machine, self.program.steps[pc]
        present = np.zeros(machine.lanes, bool)
        present[lanes] = True
        if step.ins.opcode == "bar":  # __syncwarp() may be met at different places
            for other_pc, others in self.parked.items():
                if self.program.steps[other_pc].ins.opcode == "bar":
                    present[others] = True
        required = machine.alive.reshape(-1, 32)[lanes >> 5]
        mask = self.masks[pc]
        if mask is not None:
            outside = (mask[lanes] >> (lanes & 31).astype(np.uint32) & np.uint32(1)) == 0
            if outside.any():
                lane = int(lanes[outside][0])
                raise machine.error(
                    "member-mask", step.ins, lane, f"lane {lane % 32} is not in its mask {mask[lane]:#x}"
                )
            required = required & ((mask[lanes, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)
        missing = (required & ~present.reshape(-1, 32)[lanes >> 5]).any(axis=1)
        return lanes[~missing], lanes[missing]

    def warp_step(self, pc: int, selection: Selection) -> tuple[int, Selection] | None:
        step = self.program.steps[pc]
        if selection is None and self.masks[pc] is None:
            self.actions[pc](None)
            if step.ins.opcode in ("bar", "barrier"):
                self.barriers.clocks.advance(np.arange(self.machine.lanes // 32))
            return pc + 1, None
        selection = lanes_of(self.machine, selection)
        if pc in self.parked:
            selection = np.sort(np.concatenate([self.parked.pop(pc), selection]))
        ready, waiting = self.complete(pc, selection)
        if waiting.size:
            self.parked[pc] = waiting
        if not ready.size:
            return None
        if step.ins.opcode in _TENSOR and len(ready) != 32 * len(np.unique(ready >> 5)):
            raise self.machine.error(
                "member-mask",
                step.ins,
                int(ready[0]),
                "needs all 32 lanes of the warp, and some have exited or never were",
            )
        self.actions[pc](ready)
        if step.ins.opcode == "bar":
            self.barriers.clocks.advance(np.unique(ready >> 5))
            self.release_syncwarp(ready)
        return pc + 1, ready if len(ready) < self.machine.lanes else None

    def release_syncwarp(self, ready: np.ndarray) -> None:
        """Lanes parked at another __syncwarp() of the same warps go on too."""
        warps = np.unique(ready >> 5)
        for pc in [p for p in self.parked if self.program.steps[p].ins.opcode == "bar"]:
            lanes = self.parked[pc]
            same = np.isin(lanes >> 5, warps)
            if same.any():
                self.join(pc + 1, lanes[same])
                self.parked.pop(pc)
                if not same.all():
                    self.parked[pc] = lanes[~same]


def _nothing(selection: Selection) -> None:
    """The action of steps that the scheduler carries out itself."""


def _callee(step: Step) -> tuple[str, list[str]]:
    """The function that a call names, and its argument variables."""
    operands = [o for o in step.ins.operands if not isinstance(o, Vector)]
    if len(operands) != 1 or not isinstance(operands[0], Symbol):
        raise UnsupportedInstruction(step.function.name, step.ins.line, step.ins.text, "an indirect call")
    after = step.ins.operands[step.ins.operands.index(operands[0]) + 1 :]
    arguments = [a.name for a in after[0].elements] if after else []
    return operands[0].name, arguments
