"""A kernel linked with the functions it calls: one list of steps, and where every variable lies.

Source: PTX ISA, "State Spaces" and "Abstracting the ABI".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .machine import CONST_START, LOCAL_START, SHARED_START
from .parser import Address, Function, Instruction, ParsedModule, Symbol, Vector

_UNITS = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
}


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
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    local_sizes: dict[str, int] = field(default_factory=dict)
    globals_used: list[str] = field(default_factory=list)

    def smallest_shared_access(self) -> int:
        """The granule in which shared memory is watched."""
        smallest = 16
        for step in self.steps:
            ins = step.ins
            generic = not any(m in ("global", "local", "param", "const") for m in ins.modifiers)
            if ins.opcode in ("ld", "ldu", "st", "atom", "red", "wmma") and ("shared" in ins.modifiers or generic):
                unit = next((_UNITS.get(m, 8) for m in reversed(ins.modifiers) if m in _UNITS or m.endswith("64")), 2)
                vector = 4 if "v4" in ins.modifiers else 2 if "v2" in ins.modifiers else 1
                smallest = min(smallest, 16 if ins.opcode == "wmma" else unit * vector)
            elif ins.opcode == "cp" and ins.operands and hasattr(ins.operands[-1], "value") and len(ins.operands) > 1:
                smallest = min(smallest, int(ins.operands[2].value))
        return smallest

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
    program, pending, used = Program(kernel), [kernel], set()
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
            program.local_sizes[variable.name] = variable.size
    program.local_bytes = top - LOCAL_START
    program.globals_used = [v.name for v in module.variables.values() if v.space == "global"]
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
