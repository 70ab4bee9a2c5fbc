"""Atomic read-modify-write, applied lane by lane in lane order.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions": atom, red.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Action, allow, instruction, types
from .machine import DTYPES, Machine, Selection
from .memory_ops import effective_address
from .rounding import from_bf16, to_bf16
from .spaces import Access, GenericSpace
from .syntax import SPACES, TYPE_BYTES, Instruction

_OPERATIONS = ("add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec")


def _halves(function: Callable) -> Callable:
    """Apply a float16 function to each half of packed words."""
    return lambda old, new: function(old.view(np.float16), new.view(np.float16)).view(np.uint32)


def _add_bf16(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return to_bf16(from_bf16(old).astype(np.float64) + from_bf16(new))


def _update(operation: str, kind: str) -> Callable:
    """new value = f(old value, operand, second operand), for arrays of the type."""
    if operation == "add":
        packed = {
            "f16x2": _halves(np.add),
            "bf16": _add_bf16,
            "bf16x2": lambda o, n: _add_bf16(o.view(np.uint16), n.view(np.uint16)).view(np.uint32),
        }
        add = packed.get(kind, np.add)
        return lambda old, b, c: add(old, b)
    return {
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "min": lambda old, b, c: np.minimum(old, b),
        "max": lambda old, b, c: np.maximum(old, b),
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "inc": lambda old, b, c: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
        "dec": lambda old, b, c: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
    }[operation]


@instruction("atom", "red")
def _atom(machine: Machine, ins: Instruction) -> Action:
    allow(
        machine,
        ins,
        *SPACES,
        *_OPERATIONS,
        "noftz",
        "relaxed",
        "acquire",
        "release",
        "acq_rel",
        "cta",
        "cluster",
        "gpu",
        "sys",
    )
    kind = types(ins)[-1]
    operation = next(m for m in ins.modifiers if m in _OPERATIONS)
    update, dtype = _update(operation, kind), np.dtype(DTYPES[kind])
    has_result = ins.opcode == "atom"
    target = machine.destination(ins.operands[0] if has_result else None, kind)
    address, *values = ins.operands[1:] if has_result else ins.operands
    sources = [machine.source(v, kind) for v in values]
    base, offset = effective_address(machine, address)
    space = machine.spaces[next((m for m in ins.modifiers if m in SPACES), "generic")]
    access = Access(ins, TYPE_BYTES[kind], True)

    def apply(memory: np.ndarray, at: np.ndarray, lanes: np.ndarray) -> None:
        words = memory.view(dtype)
        order = np.argsort(at, kind="stable")
        ranked = at[order]
        first = np.r_[True, ranked[1:] != ranked[:-1]]
        start = np.flatnonzero(first)
        rank = np.arange(len(at)) - np.repeat(start, np.diff(np.r_[start, len(at)]))
        by_rank = order[np.argsort(rank, kind="stable")]
        for chosen in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):  # no two lanes of one round share a word
            where, who = at[chosen], lanes[chosen]
            old = words[where]
            operands = [s[who] for s in sources]
            words[where] = update(old, operands[0], operands[1] if len(operands) > 1 else None)
            target[who] = old

    def run(selection: Selection) -> None:
        where = (base if selection is None else base[selection]).astype(np.int64) + offset
        lanes = np.arange(machine.lanes) if selection is None else selection
        if isinstance(space, GenericSpace):
            parts = space.split(where, selection)
        else:
            parts = [(space, where, slice(None), selection)]
        for each, inside, at, chosen in parts:
            apply(*each.atomic(access, inside, chosen), lanes[at])

    return run
