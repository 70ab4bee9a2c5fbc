"""The table of instructions: each opcode has a decoder that turns an instruction into an action on a machine."""

from __future__ import annotations

from collections.abc import Callable

from .machine import Machine, Selection
from .syntax import TYPE_BYTES, Instruction

Action = Callable[[Selection], None]
Decoder = Callable[[Machine, Instruction], Action]
DECODERS: dict[str, Decoder] = {}

# Instructions for which the lanes of a warp must come together: the scheduler gathers them first.
WARP_SYNCHRONOUS = {"shfl", "vote", "match", "redux", "ldmatrix", "stmatrix", "movmatrix", "mma", "wmma"}


def instruction(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Register the decoder of some opcodes."""

    def register(decoder: Decoder) -> Decoder:
        for opcode in opcodes:
            DECODERS[opcode] = decoder
        return decoder

    return register


def decode(machine: Machine, ins: Instruction) -> Action:
    """The action of an instruction, its guard predicate left out.

    Raises:
        UnsupportedInstruction: names the instruction and its line.
    """
    machine.instruction = ins
    if ins.opcode not in DECODERS:
        raise machine.unsupported("unknown instruction")
    try:
        return DECODERS[ins.opcode](machine, ins)
    except (IndexError, ValueError, KeyError) as broken:
        raise machine.unsupported(f"malformed or unknown form ({type(broken).__name__}: {broken})") from broken


def allow(machine: Machine, ins: Instruction, *known: str) -> None:
    """Refuse an instruction with a modifier that is neither a type nor known here."""
    for modifier in ins.modifiers:
        if modifier not in TYPE_BYTES and modifier not in known:
            raise machine.unsupported(f"unknown modifier .{modifier}")


def types(ins: Instruction) -> list[str]:
    """The type modifiers, in order."""
    return [m for m in ins.modifiers if m in TYPE_BYTES]
