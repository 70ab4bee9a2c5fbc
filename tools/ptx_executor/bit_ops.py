"""Bits: logic, shifts, fields, permutations, and moves.

Source: PTX ISA, "Logic and Shift Instructions", and mov, prmt, bfe, bfi, bfind, brev, popc, clz, bmsk, szext.
"""

from __future__ import annotations

import numpy as np

from .decode import Action, allow, instruction, types
from .machine import DTYPES, Machine, Selection, elementwise
from .syntax import TYPE_BYTES, Immediate, Instruction, Vector

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and", "or", "xor")
def _logic(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    if kind == "pred":
        (a, not_a), (b, not_b) = (machine.predicate(o) for o in ins.operands[1:])
        function = _LOGIC[ins.opcode]
        return elementwise(lambda x, y: function(x ^ not_a, y ^ not_b), machine.destination(ins.operands[0], kind), a, b)
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    return elementwise(_LOGIC[ins.opcode], machine.destination(ins.operands[0], kind), *sources)


@instruction("not", "cnot")
def _not(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    function = np.invert if ins.opcode == "not" else lambda a: (a == 0).astype(a.dtype)
    return elementwise(function, machine.destination(ins.operands[0], kind), machine.source(ins.operands[1], kind))


@instruction("lop3")
def _lop3(machine: Machine, ins: Instruction) -> Action:
    table = int(ins.operands[4].value)
    sources = [machine.source(o, "b32") for o in ins.operands[1:4]]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(len(a), np.uint32)
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return elementwise(function, machine.destination(ins.operands[0], "b32"), *sources)


@instruction("shl", "shr")
def _shift(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    dtype = np.dtype(DTYPES[kind])
    bits = 8 * dtype.itemsize
    a, amount, target = (
        machine.source(ins.operands[1], kind),
        machine.source(ins.operands[2], "u32"),
        machine.destination(ins.operands[0], kind),
    )
    shift = np.left_shift if ins.opcode == "shl" else np.right_shift
    signed = ins.opcode == "shr" and dtype.kind == "i"
    if isinstance(ins.operands[2], Immediate) and 0 <= ins.operands[2].value < bits:
        return elementwise(shift, target, a, machine.constant(ins.operands[2].value, kind))

    def function(x: np.ndarray, n: np.ndarray) -> np.ndarray:
        clamped = np.minimum(n, bits - 1).astype(dtype)
        result = shift(x, clamped)
        return result if signed else np.where(n < bits, result, dtype.type(0))

    return elementwise(function, target, a, amount)


@instruction("shf")
def _shf(machine: Machine, ins: Instruction) -> Action:
    left, wrap = "l" in ins.modifiers, "wrap" in ins.modifiers
    low, high, amount = (machine.source(o, "b32") for o in ins.operands[1:])

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(function, machine.destination(ins.operands[0], "b32"), low, high, amount)


@instruction("bfe")
def _bfe(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    bits, signed = 8 * TYPE_BYTES[kind], kind[0] == "s"
    dtype = DTYPES[kind]
    a, start, length = machine.source(ins.operands[1], kind), *(machine.source(o, "u32") for o in ins.operands[2:])

    def function(x: np.ndarray, p: np.ndarray, n: np.ndarray) -> np.ndarray:
        p, n = (p & np.uint32(255)).astype(np.int64), (n & np.uint32(255)).astype(np.int64)
        top = np.minimum(p + n, bits)  # one past the field
        count = np.maximum(top - p, 0)
        wide = x.astype(np.int64) if signed else x.astype(np.uint64)
        sign = (wide >> np.minimum(p + n - 1, bits - 1).clip(0).astype(wide.dtype)) & wide.dtype.type(1)
        moved = wide >> np.minimum(p, bits - 1).astype(wide.dtype)
        mask = np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1))
        field = moved.view(np.uint64) & mask
        if signed:
            field = np.where((sign == 1) & (n > 0), field | ~mask, field)
        return np.where(n == 0, np.uint64(0), field).astype(np.uint64).view(np.int64 if signed else np.uint64).astype(dtype)

    return elementwise(function, machine.destination(ins.operands[0], kind), a, start, length)


@instruction("bfi")
def _bfi(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    bits = 8 * TYPE_BYTES[kind]
    a, b = (machine.source(o, kind) for o in ins.operands[1:3])
    start, length = (machine.source(o, "u32") for o in ins.operands[3:])

    def function(x: np.ndarray, y: np.ndarray, p: np.ndarray, n: np.ndarray) -> np.ndarray:
        p, n = (p & np.uint32(255)).astype(np.uint64), np.minimum(n & np.uint32(255), np.uint32(bits)).astype(np.uint64)
        ones = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << (n & np.uint64(63))) - np.uint64(1))
        shift = p & np.uint64(63)
        inside = p < bits
        mask = np.where(inside, ones << shift, np.uint64(0))
        return ((y.astype(np.uint64) & ~mask) | (x.astype(np.uint64) << shift & mask)).astype(x.dtype)

    return elementwise(function, machine.destination(ins.operands[0], kind), a, b, start, length)


def _leading_one(x: np.ndarray) -> np.ndarray:
    """The position of the highest set bit, -1 for zero."""
    wide = x.astype(np.uint64)
    position = np.full(len(wide), -1, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        big = wide >= np.uint64(1) << np.uint64(step)
        position = np.where(big, position + step, position)
        wide = np.where(big, wide >> np.uint64(step), wide)
    return np.where(wide == 1, position + 1, position)


@instruction("clz", "popc", "bfind")
def _count(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    bits = 8 * TYPE_BYTES[kind]
    unsigned = np.dtype(f"u{TYPE_BYTES[kind]}")
    amount = "shiftamt" in ins.modifiers

    def function(x: np.ndarray) -> np.ndarray:
        if ins.opcode == "popc":
            return np.bitwise_count(x)
        value = np.where(x < 0, ~x, x) if kind[0] == "s" else x
        top = _leading_one(value.astype(unsigned))
        if ins.opcode == "clz":
            return bits - 1 - top
        return np.where(top < 0, -1, bits - 1 - top if amount else top)

    narrow = lambda x: (function(x).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)  # noqa: E731
    return elementwise(narrow, machine.destination(ins.operands[0], "u32"), machine.source(ins.operands[1], kind))


@instruction("brev")
def _brev(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]

    def function(x: np.ndarray) -> np.ndarray:
        octets = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
        return (
            np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)
            .reshape(len(x), -1)[:, ::-1]
            .copy()
            .view(x.dtype)
            .reshape(-1)
        )

    return elementwise(function, machine.destination(ins.operands[0], kind), machine.source(ins.operands[1], kind))


@instruction("bmsk")
def _bmsk(machine: Machine, ins: Instruction) -> Action:
    wrap = "wrap" in ins.modifiers

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        start, width = a.astype(np.uint64), b.astype(np.uint64)
        if wrap:
            start, width = start & np.uint64(31), width & np.uint64(31)
        start, width = np.minimum(start, np.uint64(32)), np.minimum(width, np.uint64(32))
        return (((np.uint64(1) << width) - np.uint64(1)) << start).astype(np.uint32)

    return elementwise(
        function, machine.destination(ins.operands[0], "b32"), *(machine.source(o, "u32") for o in ins.operands[1:])
    )


@instruction("szext")
def _szext(machine: Machine, ins: Instruction) -> Action:
    kind, wrap = types(ins)[-1], "wrap" in ins.modifiers

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        width = (b & np.uint32(31) if wrap else np.minimum(b, np.uint32(32))).astype(np.int64)
        moved = a.astype(np.int64) << (64 - width).clip(0, 63)
        back = (
            moved >> (64 - width).clip(0, 63)
            if kind == "s32"
            else (moved.view(np.uint64) >> (64 - width).clip(0, 63).astype(np.uint64))
        )
        return np.where(width == 0, 0, back).astype(a.dtype)

    sources = (machine.source(ins.operands[1], kind), machine.source(ins.operands[2], "u32"))
    return elementwise(function, machine.destination(ins.operands[0], kind), *sources)


@instruction("prmt")
def _prmt(machine: Machine, ins: Instruction) -> Action:
    mode = next((m for m in ins.modifiers if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), "")
    allow(machine, ins, mode)
    target = machine.destination(ins.operands[0], "b32")
    a, b, c = (machine.source(o, "b32") for o in ins.operands[1:])
    step = np.arange(4)

    def picks(control: np.ndarray) -> np.ndarray:
        n = (control & np.uint32(3)).astype(np.int64)[:, None]
        return {
            "f4e": n + step,
            "b4e": (n - step) % 8,
            "rc8": n + 0 * step,
            "ecl": np.maximum(n, step),
            "ecr": np.minimum(n, step),
            "rc16": (n & 1) * 2 + step % 2,
            "": (control[:, None] >> (4 * step).astype(np.uint32) & np.uint32(15)).astype(np.int64),
        }[mode]

    def function(x: np.ndarray, y: np.ndarray, control: np.ndarray) -> np.ndarray:
        octets = np.stack([x, y], axis=1).view(np.uint8)
        pick = picks(control)
        chosen = np.take_along_axis(octets, pick & 7, axis=1)
        if not mode and (pick & 8).any():
            chosen = np.where(pick & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)
        return np.ascontiguousarray(chosen).view(np.uint32).reshape(-1)

    if isinstance(ins.operands[3], Immediate) and not mode:
        fixed = [int(ins.operands[3].value) >> 4 * k & 15 for k in range(4)]
        if max(fixed) < 8:

            def constant(x: np.ndarray, y: np.ndarray) -> np.ndarray:
                result = np.zeros(len(x), np.uint32)
                for k, f in enumerate(fixed):
                    part = (x if f < 4 else y) >> np.uint32(8 * (f & 3)) & np.uint32(255)
                    result |= part << np.uint32(8 * k)
                return result

            return elementwise(constant, target, a, b)
    return elementwise(function, target, a, b, c)


@instruction("mov")
def _mov(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    target, value = ins.operands
    if isinstance(target, Vector):
        return _unpack(machine, target, value, kind)
    if isinstance(value, Vector):
        return _pack(machine, target, value, kind)
    if kind == "pred":
        source, negated = machine.predicate(value)
        return elementwise(lambda p: p ^ negated, machine.destination(target, kind), source)
    bits = f"b{8 * TYPE_BYTES[kind]}" if not isinstance(value, Immediate) else kind
    return elementwise(lambda x: x, machine.destination(target, bits), machine.source(value, bits))


def _unpack(machine: Machine, target: Vector, value: object, kind: str) -> Action:
    part = f"b{8 * TYPE_BYTES[kind] // len(target.elements)}"
    source = machine.source(value, kind)
    targets = [machine.destination(t, part) for t in target.elements]
    dtype = DTYPES[part]

    def run(selection: Selection) -> None:
        parts = np.ascontiguousarray(source if selection is None else source[selection]).view(dtype).reshape(-1, len(targets))
        for k, t in enumerate(targets):
            t[... if selection is None else selection] = parts[:, k]

    return run


def _pack(machine: Machine, target: object, value: Vector, kind: str) -> Action:
    part = f"b{8 * TYPE_BYTES[kind] // len(value.elements)}"
    sources = [machine.source(v, part) for v in value.elements]
    to, dtype = machine.destination(target, kind), DTYPES[kind]
    return elementwise(lambda *parts: np.stack(parts, axis=1).view(dtype).reshape(-1), to, *sources)


@instruction("selp", "slct")
def _selp(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[0]
    target = machine.destination(ins.operands[0], kind)
    a, b = (machine.source(o, kind) for o in ins.operands[1:3])
    if ins.opcode == "slct":
        return elementwise(lambda x, y, c: np.where(c >= 0, x, y), target, a, b, machine.source(ins.operands[3], types(ins)[1]))
    predicate, negated = machine.predicate(ins.operands[3])
    if negated:
        a, b = b, a
    return elementwise(lambda x, y, p: np.where(p, x, y), target, a, b, predicate)
