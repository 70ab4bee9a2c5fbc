"""Comparisons.

Source: PTX ISA, "Comparison and Selection Instructions" and "Half Precision Comparison Instructions": set, setp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Action, allow, instruction, types
from .float_ops import HALF, widen
from .machine import DTYPES, Machine, Selection, elementwise
from .rounding import flush
from .syntax import Instruction, Pair

_ORDERED: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_HALF_ONE = {"f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}


def _comparison(name: str, is_float: bool) -> Callable:
    if name in _UNORDERED:
        ordered = _ORDERED[_UNORDERED[name]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne" and is_float:  # false for NaN, unlike NumPy's
        return lambda a, b: (a < b) | (a > b)
    return _ORDERED[name]


def _decode_comparison(machine: Machine, ins: Instruction, kind: str) -> Callable:
    """The comparison of two operands of a type; packed halves give (lanes, 2)."""
    names = [m for m in ins.modifiers if m in _ORDERED or m in _UNORDERED or m in ("num", "nan")]
    allow(machine, ins, *names, *_JOIN, "ftz")
    compare = _comparison(names[0], "f" in kind)
    if kind in HALF:
        return lambda a, b: compare(widen(a, kind), widen(b, kind))
    if kind == "f32" and "ftz" in ins.modifiers:
        return lambda a, b: compare(flush(a), flush(b))
    return compare


@instruction("setp")
def _setp(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    compare = _decode_comparison(machine, ins, kind)
    join = next((_JOIN[m] for m in ins.modifiers if m in _JOIN), None)
    a, b = (machine.source(o, kind) for o in ins.operands[1:3])
    target = ins.operands[0]
    if join is None and not isinstance(target, Pair):
        return elementwise(compare, machine.destination(target, "pred"), a, b)
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    p, q = machine.destination(first, "pred"), machine.destination(second, "pred")
    third, negated = machine.predicate(ins.operands[3]) if join else (p, False)

    def run(selection: Selection) -> None:
        lanes = slice(None) if selection is None else selection
        truth = compare(a[lanes], b[lanes])
        both = (truth, ~truth) if truth.ndim == 1 else (truth[:, 0], truth[:, 1])
        if join is not None:
            other = third[lanes] ^ negated
            both = join(both[0], other), join(both[1], other)
        p[lanes], q[lanes] = both

    return run


@instruction("set")
def _set(machine: Machine, ins: Instruction) -> Action:
    result, kind = types(ins)[0], types(ins)[-1]
    compare = _decode_comparison(machine, ins, kind)
    join = next((_JOIN[m] for m in ins.modifiers if m in _JOIN), None)
    sources = [machine.source(o, kind) for o in ins.operands[1:3]]
    negated = False
    if join is not None:
        third, negated = machine.predicate(ins.operands[3])
        sources.append(third)

    def function(a: np.ndarray, b: np.ndarray, *other: np.ndarray) -> np.ndarray:
        truth = compare(a, b)
        if join is not None:
            truth = join(truth.T, other[0] ^ negated).T
        return _as_value(truth, result)

    return elementwise(function, machine.destination(ins.operands[0], result), *sources)


def _as_value(truth: np.ndarray, kind: str) -> np.ndarray:
    """1.0 for the floating-point types, all ones for integers."""
    if truth.ndim == 2:  # a pair in one register
        pair = np.where(truth, np.uint16(_HALF_ONE.get(kind, 0xFFFF)), np.uint16(0))
        return np.ascontiguousarray(pair).view(np.uint32).reshape(-1)
    if kind == "bf16":
        return np.where(truth, np.uint16(_HALF_ONE[kind]), np.uint16(0))
    if kind in ("f16", "f32"):
        return truth.astype(DTYPES[kind])
    ones = np.array(-1).astype(DTYPES[kind])
    return np.where(truth, ones, np.zeros_like(ones))
