"""What a PTX module consists of: types, operands, instructions, variables, functions.

Source: PTX ISA, "Syntax" and "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

TYPE_BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip
SPACES = ("param", "global", "shared", "local", "const")


@dataclass(frozen=True)
class Register:
    """A register, named uniquely within its function (scoped names carry the scope's number)."""

    name: str


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: ``value`` is an int, or a float for the decimal, 0f and 0d forms."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """A label, variable or function, with a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is None for an absolute address."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple


@dataclass(frozen=True)
class Pair:
    """The two destinations of ``d|p``; either may be None (``_``)."""

    first: object
    second: object


@dataclass(frozen=True)
class Not:
    """A negated predicate operand, ``!p``."""

    register: Register


@dataclass
class Instruction:
    """One instruction: ``opcode`` ('add'), ``modifiers`` ('s32', ...), operands, guard and where it stands."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: list
    guard: Register | None
    guard_negated: bool
    line: int
    text: str
    source: str


@dataclass
class Variable:
    """A variable of a state space: byte size, alignment, element type and initial bytes (or (offset, symbol)
    references)."""

    name: str
    space: str
    size: int
    align: int
    kind: str
    initial: bytes | None = None
    references: list[tuple[int, Symbol]] = field(default_factory=list)
    extern: bool = False


@dataclass
class Function:
    """A kernel or a device function."""

    name: str
    is_kernel: bool
    parameters: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class ParsedModule:
    """What a PTX text declares."""

    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]


def encode(value: int | float, kind: str) -> bytes:
    """The little-endian bytes of a constant of a PTX type."""
    size = TYPE_BYTES[kind]
    if kind == "f32" and isinstance(value, float):
        return struct.pack("<f", value)
    if kind == "f64" and isinstance(value, float):
        return struct.pack("<d", value)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
