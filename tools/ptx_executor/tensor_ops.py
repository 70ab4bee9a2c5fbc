"""Tensor-core instructions.

A fragment register holds, in lane 4 * g + t, four bytes' worth of elements of row g; a matrix is tiled by such 8-row
pieces. Products are exact, sums are taken in float64, and the result is rounded once for each instruction; hardware
may differ in the last bit.

Source: PTX ISA, "Warp Level Matrix Instructions": mma (fragment figures for each shape), ldmatrix, stmatrix, movmatrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .decode import Action, allow, instruction
from .machine import Machine, Selection
from .memory_ops import effective_address
from .rounding import from_bf16
from .shared import SharedSpace
from .spaces import Access
from .syntax import Instruction, Vector

_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f64": 64, "s8": 8, "u8": 8, "s4": 4, "u4": 4}
SHAPES = {
    "f16": ("m16n8k8", "m16n8k16"), "bf16": ("m16n8k8", "m16n8k16"), "tf32": ("m16n8k4", "m16n8k8"), "f64": ("m8n8k4",),
    "s8": ("m8n8k16", "m16n8k16", "m16n8k32"), "s4": ("m8n8k32", "m16n8k32", "m16n8k64"),
}  # fmt: skip


def decode_elements(raw: np.ndarray, kind: str) -> np.ndarray:
    """The elements of fragment registers as float64, along a new last axis."""
    if kind in ("s4", "u4"):
        octets = np.ascontiguousarray(raw).view(np.uint8).reshape(*raw.shape, -1)
        nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*raw.shape, -1).astype(np.float64)
        return np.where(nibbles > 7, nibbles - 16, nibbles) if kind == "s4" else nibbles
    dtype = {"f16": np.float16, "bf16": np.uint16, "tf32": np.uint32, "f64": np.float64, "s8": np.int8, "u8": np.uint8}[kind]
    parts = np.ascontiguousarray(raw).view(dtype).reshape(*raw.shape, -1)
    if kind == "bf16":
        return from_bf16(parts).astype(np.float64)
    if kind == "tf32":
        return (parts & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return parts.astype(np.float64)


def matrix_from(registers: list[np.ndarray], kind: str, rows: int) -> np.ndarray:
    """Fragment registers, each (warps * 32,), to matrices (warps, rows, columns)."""
    pieces = []
    for raw in registers:
        elements = decode_elements(raw.reshape(-1, 8, 4), kind)  # warps, g, t, element
        pieces.append(elements.reshape(len(elements), 8, -1))
    tall = rows // 8
    columns = [pieces[k] if tall == 1 else np.concatenate(pieces[k : k + tall], axis=1) for k in range(0, len(pieces), tall)]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=2)


def to_accumulator(value: np.ndarray, kind: str, saturate: bool) -> np.ndarray:
    """Round float64 sums to the accumulator's type."""
    if kind == "s32":
        if saturate:
            return np.clip(value, -(2.0**31), 2.0**31 - 1).astype(np.int32)
        return value.astype(np.int64).astype(np.int32)
    return value.astype({"f32": np.float32, "f16": np.float16, "f64": np.float64}[kind])


def selected(array: np.ndarray, selection: Selection) -> np.ndarray:
    return array if selection is None else array[selection]


def _accumulator_in(machine: Machine, operand: object, kind: str) -> Callable[[Selection], np.ndarray]:
    """A reader of the matrices (warps, rows, 8) of an accumulator fragment."""
    names = operand.elements if isinstance(operand, Vector) else (operand,)
    register = {"f32": "f32", "s32": "s32", "f16": "b32", "f64": "f64"}[kind]
    sources = [machine.source(n, register) for n in names]

    def read(selection: Selection) -> np.ndarray:
        columns = [selected(s, selection).reshape(-1, 8, 4) for s in sources]
        if kind == "f16":
            parts = [np.ascontiguousarray(c).view(np.float16).reshape(-1, 8, 8) for c in columns]
        else:
            parts = [np.stack(columns[k : k + 2], axis=3).reshape(-1, 8, 8) for k in range(0, len(columns), 2)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)).astype(np.float64)

    return read


def _accumulator_out(machine: Machine, operand: object, kind: str) -> Callable[[Selection, np.ndarray], None]:
    names = operand.elements if isinstance(operand, Vector) else (operand,)
    register = {"f32": "f32", "s32": "s32", "f16": "b32", "f64": "f64"}[kind]
    targets = [machine.destination(n, register) for n in names]

    def write(selection: Selection, matrices: np.ndarray) -> None:
        lanes = slice(None) if selection is None else selection
        for k, target in enumerate(targets):
            if kind == "f16":
                part = np.ascontiguousarray(matrices[:, 8 * k : 8 * k + 8]).reshape(-1, 8).view(np.uint32)
            else:
                part = matrices[:, 8 * (k // 2) : 8 * (k // 2) + 8, k % 2 :: 2]
            target[lanes] = part.reshape(-1)

    return write


@instruction("mma")
def _mma(machine: Machine, ins: Instruction) -> Action:
    shape = next((m for m in ins.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    allow(machine, ins, shape, "sync", "aligned", "row", "col", "satfinite", "s4", "u4")
    kinds = [m for m in ins.modifiers if m in _BITS or m in ("f32", "s32")]
    d_kind, a_kind, b_kind, c_kind = kinds if len(kinds) == 4 else ("", "", "", "")
    family = {"u8": "s8", "u4": "s4"}.get(a_kind, a_kind)
    if shape not in SHAPES.get(family, ()) or [m for m in ins.modifiers if m in ("row", "col")] != ["row", "col"]:
        raise machine.unsupported(f"mma of shape {shape or '?'}, types {kinds}")
    rows = int(shape[1:].split("n")[0])
    register = "f64" if family == "f64" else "b32"
    a, b = ([machine.source(n, register) for n in (o.elements if isinstance(o, Vector) else (o,))] for o in ins.operands[1:3])
    depth = int(shape.split("k")[1])
    per_register = max(1, 32 // _BITS[a_kind]) * 4
    if len(a) * per_register * 8 != rows * depth or len(b) * per_register != depth:
        raise machine.unsupported("mma with the wrong number of registers")
    read_c, write_d = (
        _accumulator_in(machine, ins.operands[3], c_kind),
        _accumulator_out(machine, ins.operands[0], d_kind),
    )
    saturate = "satfinite" in ins.modifiers

    def run(selection: Selection) -> None:
        left = matrix_from([selected(r, selection) for r in a], a_kind, rows)
        right = matrix_from([selected(r, selection) for r in b], b_kind, 8)
        total = np.matmul(left, right.transpose(0, 2, 1)) + read_c(selection)
        write_d(selection, to_accumulator(total, d_kind, saturate))

    return run


def _matrix_count(machine: Machine, ins: Instruction) -> int:
    allow(machine, ins, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
    return next(int(m[1]) for m in ins.modifiers if m in ("x1", "x2", "x4"))


class _Rows:
    """The row addresses of ldmatrix and stmatrix: lanes 8 i .. 8 i + 7 give those of matrix i."""

    def __init__(self, machine: Machine, ins: Instruction, operand: object, count: int) -> None:
        self.machine, self.count = machine, count
        self.base, self.offset = effective_address(machine, operand)  # type: ignore[arg-type]
        shared = machine.spaces["shared" if "shared" in ins.modifiers else "generic"]
        if not isinstance(shared, SharedSpace):
            raise machine.unsupported("a generic address")
        self.space, self.access = shared, Access(ins, 16)

    def lanes(self, selection: Selection) -> np.ndarray:
        lanes = np.arange(self.machine.lanes) if selection is None else selection
        return lanes.reshape(-1, 32)[:, : 8 * self.count].reshape(-1)

    def select(self, selection: Selection) -> tuple[np.ndarray, Selection]:
        """(addresses, their lanes)"""
        lanes = self.lanes(selection)
        chosen = None if len(lanes) == self.machine.lanes else lanes
        return selected(self.base, chosen).astype(np.int64) + self.offset, chosen


@instruction("ldmatrix")
def _ldmatrix(machine: Machine, ins: Instruction) -> Action:
    count, transpose = _matrix_count(machine, ins), "trans" in ins.modifiers
    names = ins.operands[0].elements if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    targets = [machine.destination(n, "b32") for n in names]
    rows = _Rows(machine, ins, ins.operands[1], count)
    if len(targets) != count:
        raise machine.unsupported(f"ldmatrix.x{count} with {len(targets)} registers")

    def run(selection: Selection) -> None:
        raw = rows.space.load(rows.access, *rows.select(selection), kind="ldmatrix")
        if transpose:
            halves = np.ascontiguousarray(raw.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3))
            words = halves.view(np.uint32).reshape(-1, count, 32)
        else:
            words = raw.view(np.uint32).reshape(-1, count, 32)
        for k, target in enumerate(targets):
            target[slice(None) if selection is None else selection] = words[:, k].reshape(-1)

    return run


@instruction("stmatrix")
def _stmatrix(machine: Machine, ins: Instruction) -> Action:
    count, transpose = _matrix_count(machine, ins), "trans" in ins.modifiers
    names = ins.operands[1].elements if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    sources = [machine.source(n, "b32") for n in names]
    rows = _Rows(machine, ins, ins.operands[0], count)

    def run(selection: Selection) -> None:
        words = np.stack([selected(s, selection).reshape(-1, 32) for s in sources], axis=1)
        if transpose:
            halves = words.view(np.uint16).reshape(-1, count, 8, 8)
            words = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
        where, lanes = rows.select(selection)
        raw = np.ascontiguousarray(words).reshape(-1, 4).view(np.dtype("V16")).reshape(-1)
        rows.space.store(rows.access, where, raw, lanes, kind="stmatrix")

    return run


@instruction("movmatrix")
def _movmatrix(machine: Machine, ins: Instruction) -> Action:
    source, target = machine.source(ins.operands[1], "b32"), machine.destination(ins.operands[0], "b32")

    def run(selection: Selection) -> None:
        halves = np.ascontiguousarray(selected(source, selection)).view(np.uint16).reshape(-1, 8, 8)
        moved = np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32).reshape(-1)
        target[slice(None) if selection is None else selection] = moved

    return run
