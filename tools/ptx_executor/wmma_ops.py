"""wmma: matrix instructions whose fragments have no documented layout.

Ours: lane l holds the l-th of 32 equal runs of the matrix, row by row, packed in the fragment's first registers;
registers beyond those needed repeat the first ones, so that code which works on every element of a fragment still
does.

Source: PTX ISA, "Warp Level Matrix Instructions using wmma.mma": wmma.load, wmma.store, wmma.mma.
"""

from __future__ import annotations

import re

import numpy as np

from .decode import Action, allow, instruction
from .machine import DTYPES, Machine, Selection, lanes_of
from .memory_ops import effective_address
from .spaces import RAW, Access
from .syntax import SPACES, TYPE_BYTES, Instruction
from .tensor_ops import decode_elements, selected, to_accumulator

_TYPES = {"f16", "bf16", "tf32", "f32", "f64", "s8", "u8", "s32"}


def _shape(ins: Instruction, machine: Machine) -> tuple[int, int, int]:
    for modifier in ins.modifiers:
        if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", modifier):
            return int(found[1]), int(found[2]), int(found[3])
    raise machine.unsupported("wmma without a shape")


class _Fragment:
    """The registers of one fragment: ``rows`` x ``columns`` elements of a type, in the order row by row."""

    def __init__(self, machine: Machine, operand: object, kind: str, rows: int, columns: int) -> None:
        self.machine, self.kind, self.rows, self.columns = machine, kind, rows, columns
        self.names = operand.elements  # type: ignore[attr-defined]
        self.element = np.dtype(DTYPES[kind])
        self.each = rows * columns // 32  # elements that a lane holds
        self.register = {"f64": "b64"}.get(kind, "b32")
        self.packed = TYPE_BYTES[self.register] // self.element.itemsize
        self.used = self.each // self.packed
        if self.used < 1 or len(self.names) % self.used:
            raise machine.unsupported(f"a wmma fragment of {len(self.names)} registers")

    def read(self, selection: Selection) -> np.ndarray:
        """The matrices (warps, rows, columns) as float64."""
        registers = [selected(self.machine.source(n, self.register), selection) for n in self.names[: self.used]]
        raw = np.stack(registers, axis=1)
        if self.kind in ("f32", "s32"):
            elements = raw.view(self.element).astype(np.float64)
        else:
            elements = decode_elements(raw, self.kind)
        return elements.reshape(-1, self.rows, self.columns)

    def write(self, selection: Selection, matrices: np.ndarray) -> None:
        """Set the registers from matrices of the element's dtype."""
        registers: np.ndarray = np.ascontiguousarray(matrices.reshape(-1, self.each)).view(DTYPES[self.register])
        lanes = slice(None) if selection is None else selection
        for k, name in enumerate(self.names):
            self.machine.destination(name, self.register)[lanes] = registers[:, k % self.used]

    def bits(self, selection: Selection) -> np.ndarray:
        """The matrices with their elements' own dtype."""
        registers = [selected(self.machine.source(n, self.register), selection) for n in self.names[: self.used]]
        return np.stack(registers, axis=1).view(self.element).reshape(-1, self.rows, self.columns)


@instruction("wmma")
def _wmma(machine: Machine, ins: Instruction) -> Action:
    known = [m for m in ins.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)]
    allow(
        machine,
        ins,
        *known,
        *SPACES,
        "load",
        "store",
        "mma",
        "a",
        "b",
        "c",
        "d",
        "sync",
        "aligned",
        "row",
        "col",
        "satfinite",
        "rn",
    )
    m, n, k = _shape(ins, machine)
    if ins.modifiers[0] == "mma":
        return _product(machine, ins, m, n, k)
    kind = next(t for t in reversed(ins.modifiers) if t in _TYPES)
    rows, columns = {"a": (m, k), "b": (k, n), "c": (m, n), "d": (m, n)}[ins.modifiers[1]]
    return _transfer(machine, ins, kind, rows, columns)


def _product(machine: Machine, ins: Instruction, m: int, n: int, k: int) -> Action:
    kinds = [t for t in ins.modifiers if t in _TYPES]
    if len(kinds) == 2:  # f16 operands: only the accumulators' types are named
        kinds = [kinds[0], "f16", "f16", kinds[1]]
    d, a, b, c = (
        _Fragment(machine, operand, kind, rows, columns)
        for operand, kind, rows, columns in zip(ins.operands, kinds, (m, m, k, m), (n, k, n, n), strict=True)
    )
    saturate = "satfinite" in ins.modifiers

    def run(selection: Selection) -> None:
        total = np.matmul(a.read(selection), b.read(selection)) + c.read(selection)
        d.write(selection, to_accumulator(total, d.kind, saturate))

    return run


def _transfer(machine: Machine, ins: Instruction, kind: str, rows: int, columns: int) -> Action:
    store = ins.modifiers[0] == "store"
    address, operand = (ins.operands[0], ins.operands[1]) if store else (ins.operands[1], ins.operands[0])
    fragment = _Fragment(machine, operand, kind, rows, columns)
    stride = machine.source(ins.operands[2], "u32") if len(ins.operands) > 2 else None
    by_row = "row" in ins.modifiers
    base, offset = effective_address(machine, address)
    space = machine.spaces[next((s for s in ins.modifiers if s in SPACES), "generic")]
    # A lane moves a run of elements that are neighbours in memory, at most 16 bytes of them.
    length = columns if by_row else rows
    run_of = min(fragment.each, length, 16 // fragment.element.itemsize)
    access = Access(ins, run_of * fragment.element.itemsize)

    def run(selection: Selection) -> None:
        lanes = lanes_of(machine, selection)
        start = base[lanes].astype(np.int64) + offset
        pitch = stride[lanes].astype(np.int64) if stride is not None else np.full(len(lanes), length)
        matrices = fragment.bits(selection) if store else np.empty((len(lanes) // 32, rows, columns), fragment.element)
        flat = np.ascontiguousarray(matrices if by_row else matrices.swapaxes(1, 2)).reshape(-1, 32 * fragment.each)
        steps = 32 * fragment.each // (32 * run_of)
        for step in range(steps):
            first = (step * 32 + lanes % 32) * run_of  # the element, in memory's order, that a lane begins with
            where = start + (first // length * pitch + first % length) * fragment.element.itemsize
            part = slice(step * 32 * run_of, (step + 1) * 32 * run_of)
            if store:
                pieces = np.ascontiguousarray(flat[:, part]).reshape(-1, run_of).view(RAW[access.size]).reshape(-1)
                space.store(access, where, pieces, selection)
            else:
                pieces = space.load(access, where, selection)
                flat[:, part] = pieces.view(fragment.element).reshape(-1, 32 * run_of)
        if not store:
            shape = (-1, rows, columns) if by_row else (-1, columns, rows)
            loaded = flat.reshape(shape)
            fragment.write(selection, loaded if by_row else loaded.swapaxes(1, 2))

    return run
