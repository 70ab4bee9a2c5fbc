"""Device functions: arguments and results on each lane's stack, and where each lane returns to.

Source: PTX ISA, "Abstracting the ABI" and "Control Flow Instructions: call, ret".
"""

from __future__ import annotations

import numpy as np

from .errors import UnsupportedInstruction
from .machine import Machine, Selection, lanes_of
from .printf import format_message
from .program import Program, Step
from .spaces import LocalSpace
from .syntax import Symbol, Vector

_DEPTH = 8  # of nested calls; a function's registers and stack are there once, so none can call itself


class Calls:
    """The calls in progress of every lane of a machine."""

    def __init__(self, machine: Machine, program: Program) -> None:
        self.machine, self.program = machine, program
        self.depth = np.zeros(machine.lanes, np.int64)
        self.returns = np.zeros((_DEPTH, machine.lanes), np.int64)

    def reset(self) -> None:
        self.depth[:] = 0

    @property
    def local(self) -> LocalSpace:
        space = self.machine.spaces["local"]
        assert isinstance(space, LocalSpace)
        return space

    def call(self, pc: int, step: Step, selection: Selection) -> int:
        """Pass the arguments; the step at which the lanes go on."""
        lanes = lanes_of(self.machine, selection)
        name, arguments = _callee(step)
        if name not in self.program.entry:
            self.built_in(name, arguments, step, lanes)
            return pc + 1
        if self.depth[lanes].max() >= _DEPTH:
            message = f"calls are nested deeper than {_DEPTH}; recursion is not supported"
            raise self.machine.error("trap", step.ins, int(lanes[0]), message)
        entry = self.program.entry[name]
        callee = self.program.steps[entry].function
        for variable, argument in zip(callee.parameters, arguments, strict=True):
            self.copy(argument, variable.name, variable.size, lanes)
        self.returns[self.depth[lanes], lanes] = pc + 1
        self.depth[lanes] += 1
        return entry

    def built_in(self, name: str, arguments: list[str], step: Step, lanes: np.ndarray) -> None:
        """The functions that CUDA brings and PTX only declares."""
        if name == "__assertfail":
            raise self.machine.error("trap", step.ins, int(lanes[0]), "an assertion failed")
        if name != "vprintf":
            reason = f"a call of {name}, which the PTX does not define"
            raise UnsupportedInstruction(step.function.name, step.ins.line, step.ins.text, reason)
        values = [self.local.read(self.program.local[a], 8, lanes).view(np.uint64).reshape(-1) for a in arguments]
        for lane, text, packed in zip(lanes.tolist(), *(v.tolist() for v in values), strict=True):
            self.machine.counters.printed.append(format_message(self.machine, text, packed, lane))
        results = step.ins.operands[0]
        if isinstance(results, Vector):
            nothing = np.zeros((len(lanes), 4), np.uint8)
            self.local.write(self.program.local[results.elements[0].name], nothing, lanes)

    def ret(self, step: Step, selection: Selection) -> list[tuple[int, np.ndarray]]:
        """Hand back the results; (step, lanes) of every place that was returned to."""
        lanes = lanes_of(self.machine, selection)
        self.depth[lanes] -= 1
        targets = self.returns[self.depth[lanes], lanes]
        places = [(int(target), lanes[targets == target]) for target in np.unique(targets)]
        for target, there in places:
            results = self.program.steps[target - 1].ins.operands[0]
            if isinstance(results, Vector):
                for variable, to in zip(step.function.results, results.elements, strict=True):
                    self.copy(variable.name, to.name, variable.size, there)
        return places

    def copy(self, source: str, target: str, size: int, lanes: np.ndarray) -> None:
        content = self.local.read(self.program.local[source], size, lanes)
        self.local.write(self.program.local[target], content, lanes)


def _callee(step: Step) -> tuple[str, list[str]]:
    """The function that a call names, and its argument variables."""
    operands = [o for o in step.ins.operands if not isinstance(o, Vector)]
    if len(operands) != 1 or not isinstance(operands[0], Symbol):
        raise UnsupportedInstruction(step.function.name, step.ins.line, step.ins.text, "an indirect call")
    after = step.ins.operands[step.ins.operands.index(operands[0]) + 1 :]
    arguments = [a.name for a in after[0].elements] if after else []
    return operands[0].name, arguments
