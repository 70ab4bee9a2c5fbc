"""Integer arithmetic.

Source: PTX ISA, "Integer Arithmetic Instructions" and "Extended-Precision Integer Arithmetic Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Action, allow, instruction, types
from .machine import DTYPES, Machine, Selection, elementwise
from .syntax import TYPE_BYTES, Instruction

_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division towards zero; by zero it gives all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = floor + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~b, floor.astype(a.dtype))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - _quotient(a, b) * b)


_SIMPLE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "div": _quotient, "rem": _remainder,
}  # fmt: skip


def integer(machine: Machine, ins: Instruction) -> Action:
    """add, sub, mul, mad, div, rem, abs, neg, min, max of integer types."""
    kind = types(ins)[-1]
    allow(machine, ins, "lo", "hi", "wide", "sat", "cc")
    if ins.opcode in ("mul", "mad"):
        return _multiply(machine, ins, kind)
    if ins.opcode not in _SIMPLE:
        raise machine.unsupported(f"{ins.opcode} of integers")
    target = machine.destination(ins.operands[0], kind)
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    function = _SIMPLE[ins.opcode]
    if "cc" in ins.modifiers:
        return _extended(machine, ins, kind, target, sources, use=False)
    if "sat" in ins.modifiers:
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        return elementwise(lambda a, b: np.clip(function(a.astype(np.int64), b), low, high), target, *sources)
    return elementwise(function, target, *sources)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers of one type."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y, low, s = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x & low) * (y & low) >> s
    cross1 = (x >> s) * (y & low) + middle
    cross2 = (x & low) * (y >> s) + (cross1 & low)
    high = (x >> s) * (y >> s) + (cross1 >> s) + (cross2 >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _multiply(machine: Machine, ins: Instruction, kind: str) -> Action:
    wide = "wide" in ins.modifiers
    result = _WIDER[kind] if wide else kind
    target = machine.destination(ins.operands[0], result)
    sources = [machine.source(o, kind) for o in ins.operands[1:3]]
    if ins.opcode == "mad":
        sources.append(machine.source(ins.operands[3], result))
    dtype = DTYPES[result]
    if wide:
        product: Callable = lambda a, b: a.astype(dtype) * b.astype(dtype)  # noqa: E731
    elif "hi" in ins.modifiers:
        product = high_product
    else:
        product = np.multiply
    if ins.opcode == "mul":
        return elementwise(product, target, *sources)
    if "cc" in ins.modifiers:
        return _multiply_carry(machine, ins, target, sources, product, use=False)
    if "sat" in ins.modifiers:
        raise machine.unsupported("mad.hi.sat")
    return elementwise(lambda a, b, c: product(a, b) + c, target, *sources)


# ---- carries ---------------------------------------------------------------------------------------------------------
def _carry(machine: Machine) -> np.ndarray:
    """The condition-code register."""
    return machine.special.setdefault("condition code", np.zeros(machine.lanes, np.uint64))


def _extended(machine: Machine, ins: Instruction, kind: str, target: np.ndarray, sources: list, use: bool) -> Action:
    unsigned = np.dtype(f"u{TYPE_BYTES[kind]}")
    carry, keep, minus = _carry(machine), "cc" in ins.modifiers, ins.opcode.startswith("sub")

    def run(selection: Selection) -> None:
        lanes = slice(None) if selection is None else selection
        a, b = (np.ascontiguousarray(s[lanes]).view(unsigned) for s in sources)
        extra = carry[lanes].astype(unsigned) if use else np.zeros(len(a), unsigned)
        if minus:
            result = a - b - extra
            out = (a < b) | ((a == b) & (extra == 1))
        else:
            result = a + b + extra
            out = (result < a) | ((result == a) & (extra == 1))
        target[lanes] = result.view(target.dtype)
        if keep:
            carry[lanes] = out

    return run


@instruction("addc", "subc")
def _addc(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    target = machine.destination(ins.operands[0], kind)
    return _extended(machine, ins, kind, target, [machine.source(o, kind) for o in ins.operands[1:]], use=True)


def _multiply_carry(
    machine: Machine, ins: Instruction, target: np.ndarray, sources: list, product: Callable, use: bool
) -> Action:
    """mad.cc and madc: the product plus the addend plus the carry."""
    carry, keep = _carry(machine), "cc" in ins.modifiers

    def run(selection: Selection) -> None:
        lanes = slice(None) if selection is None else selection
        a, b, c = (s[lanes] for s in sources)
        term = product(a, b)
        total = term + c
        unsigned = np.dtype(f"u{total.dtype.itemsize}")
        out = total.view(unsigned) < np.ascontiguousarray(c).view(unsigned)
        if use:
            total = total + carry[lanes].astype(total.dtype)
            out |= (total == 0) & (carry[lanes] == 1)
        target[lanes] = total
        if keep:
            carry[lanes] = out

    return run


@instruction("madc")
def _madc(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    product = high_product if "hi" in ins.modifiers else np.multiply
    return _multiply_carry(machine, ins, machine.destination(ins.operands[0], kind), sources, product, use=True)


# ---- bits and sums ---------------------------------------------------------------------------------------------------
@instruction("mul24", "mad24")
def _mul24(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    shift = 16 if "hi" in ins.modifiers else 0
    sources = [machine.source(o, kind) for o in ins.operands[1:]]

    def function(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        low = [(x.astype(np.int64) << 40) >> 40 if kind == "s32" else x.astype(np.int64) & 0xFFFFFF for x in (a, b)]
        product = (low[0] * low[1]) >> shift
        return (product + c[0] if c else product).astype(a.dtype)

    return elementwise(function, machine.destination(ins.operands[0], kind), *sources)


@instruction("sad")
def _sad(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    return elementwise(
        lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)), machine.destination(ins.operands[0], kind), *sources
    )


def _dot(machine: Machine, ins: Instruction, split: Callable) -> Action:
    a_kind, b_kind = types(ins)[-2:]
    result = "s32" if "s32" in (a_kind, b_kind) else "u32"
    dtype = DTYPES[result]
    sources = [machine.source(o, k) for o, k in zip(ins.operands[1:], ("b32", "b32", result), strict=True)]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x, y = split(a, b, a_kind[0], b_kind[0])
        return (x.astype(np.int64) * y.astype(np.int64)).sum(axis=1).astype(dtype) + c

    return elementwise(function, machine.destination(ins.operands[0], result), *sources)


def _parts(words: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(words).view(dtype).reshape(len(words), -1)


@instruction("dp4a")
def _dp4a(machine: Machine, ins: Instruction) -> Action:
    letter = {"s": "i1", "u": "u1"}
    return _dot(machine, ins, lambda a, b, x, y: (_parts(a, letter[x]), _parts(b, letter[y])))


@instruction("dp2a")
def _dp2a(machine: Machine, ins: Instruction) -> Action:
    wide, byte, half = (
        {"s": "i2", "u": "u2"},
        {"s": "i1", "u": "u1"},
        slice(2, 4) if "hi" in ins.modifiers else slice(0, 2),
    )
    return _dot(machine, ins, lambda a, b, x, y: (_parts(a, wide[x]), _parts(b, byte[y])[:, half]))
