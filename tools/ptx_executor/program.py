"""A kernel linked with the functions it calls: one list of steps, and where every variable lies.

Source: PTX ISA, "State Spaces" and "Abstracting the ABI".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .machine import CONST_START, LOCAL_START, SHARED_START
from .syntax import SPACES, TYPE_BYTES, Address, Function, Instruction, ParsedModule, Symbol, Vector

_ACCESSES = ("ld", "ldu", "st", "atom", "red", "wmma")


def _may_be(ins: Instruction, space: str) -> bool:
    """Whether a memory instruction addresses a state space, perhaps by a generic address."""
    return next((m for m in ins.modifiers if m in SPACES), space) == space


def _bytes_of(ins: Instruction) -> int:
    """The bytes that each lane accesses; for wmma the smallest run of them."""
    if ins.opcode == "wmma":
        return 4
    vector = 4 if "v4" in ins.modifiers else 2 if "v2" in ins.modifiers else 1
    return next(TYPE_BYTES[m] for m in reversed(ins.modifiers) if m in TYPE_BYTES) * vector


@dataclass
class Step:
    """One instruction of the linked program and the function it belongs to."""

    function: Function
    ins: Instruction


@dataclass
class Program:
    """``entry`` and ``labels`` give step numbers; the address tables are keyed by variable name."""

    kernel: Function
    steps: list[Step] = field(default_factory=list)
    entry: dict[str, int] = field(default_factory=dict)
    labels: dict[tuple[str, str], int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    def smallest_shared_access(self) -> int:
        """The granule in which shared memory is watched."""
        sizes = [_bytes_of(s.ins) for s in self.steps if s.ins.opcode in _ACCESSES and _may_be(s.ins, "shared")]
        copies = [int(s.ins.operands[2].value) for s in self.steps if s.ins.opcode == "cp" and len(s.ins.operands) > 2]
        return min([16, *sizes, *copies])

    def smallest_global_access(self) -> int:
        """The granule in which global memory is watched."""
        sizes = [_bytes_of(s.ins) for s in self.steps if s.ins.opcode in _ACCESSES and _may_be(s.ins, "global")]
        copies = [int(s.ins.operands[2].value) for s in self.steps if s.ins.opcode == "cp" and len(s.ins.operands) > 2]
        partial = any(s.ins.opcode == "cp" and len(s.ins.operands) > 3 for s in self.steps)
        return min([16, *sizes, *([1] if partial else copies)])

    def has_fences(self) -> bool:
        return any(s.ins.opcode in ("membar", "fence") for s in self.steps)

    def has_shared_atomics(self) -> bool:
        return any(s.ins.opcode in ("atom", "red") and "global" not in s.ins.modifiers for s in self.steps)


def symbols_of(ins: Instruction) -> set[str]:
    """The names of the symbols that an instruction mentions."""
    found: set[str] = set()
    for operand in ins.operands:
        for part in operand.elements if isinstance(operand, Vector) else (operand,):
            if isinstance(part, Address):
                part = part.base
            if isinstance(part, Symbol):
                found.add(part.name)
    return found


def _place(table: dict[str, int], name: str, top: int, size: int, align: int) -> int:
    table[name] = -(-top // align) * align
    return table[name] + size


def link(module: ParsedModule, kernel: Function, dynamic_shared: int) -> Program:
    """Lay out a kernel and all functions that it can reach."""
    program, pending, used = Program(kernel, dynamic_shared=dynamic_shared), [kernel], set()
    while pending:
        function = pending.pop(0)
        if function.name in program.entry:
            continue
        program.entry[function.name] = len(program.steps)
        for label, at in function.labels.items():
            program.labels[function.name, label] = at + len(program.steps)
        for ins in function.body:
            program.steps.append(Step(function, ins))
            names = symbols_of(ins)
            used |= names
            if ins.opcode == "call":
                pending += [module.functions[n] for n in names if n in module.functions]
    reachable = [module.functions[name] for name in program.entry]

    top, dynamic, alignment = SHARED_START, [], 16
    for variable in [*module.variables.values(), *(v for f in reachable for v in f.variables.values())]:
        if variable.space == "shared" and (variable.name in used or "#" in variable.name):
            if variable.extern or variable.size == 0:
                dynamic.append(variable.name)
                alignment = max(alignment, variable.align)
            else:
                top = _place(program.shared, variable.name, top, variable.size, variable.align)
    if dynamic or dynamic_shared:
        start = -(-top // alignment) * alignment
        program.shared.update(dict.fromkeys(dynamic, start))
        top = start + dynamic_shared
    program.shared_bytes = top - SHARED_START

    top = LOCAL_START
    for function in reachable:
        formals = [] if function is kernel else [*function.parameters, *function.results]
        for variable in [*formals, *(v for v in function.variables.values() if v.space in ("local", "param"))]:
            top = _place(program.local, variable.name, top, variable.size, max(variable.align, 1))
    program.local_bytes = top - LOCAL_START
    return program


def layout_constants(module: ParsedModule) -> tuple[dict[str, int], bytearray]:
    """Addresses and content of the .const variables."""
    table: dict[str, int] = {}
    top = CONST_START
    for variable in module.variables.values():
        if variable.space == "const":
            top = _place(table, variable.name, top, variable.size, variable.align)
    content = bytearray(top - CONST_START)
    for name, at in table.items():
        initial = module.variables[name].initial
        if initial:
            content[at - CONST_START : at - CONST_START + len(initial)] = initial
    return table, content
