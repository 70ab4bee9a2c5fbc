"""Conversions between all types, with their rounding.

Source: PTX ISA, "Data Movement and Conversion Instructions: cvt" and "cvt.pack".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .decode import Action, allow, instruction, types
from .machine import DTYPES, Machine, elementwise
from .rounding import ROUNDINGS, flush, from_bf16, narrow, saturate, to_bf16, two_sum
from .syntax import Instruction

_INTEGER_ROUNDINGS: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64")


def _is_float(kind: str) -> bool:
    return kind in _FLOATS


def _range(dtype: Any) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _to_f64(value: np.ndarray, kind: str) -> np.ndarray:
    return (from_bf16(value) if kind == "bf16" else value).astype(np.float64)


def _float_to_integer(kind: str, source: str, rounding: str) -> Callable:
    dtype = np.dtype(DTYPES[kind])
    low, high = _range(dtype)
    nan = 0 if dtype.itemsize < 8 and source != "f64" else 1 << (8 * dtype.itemsize - 1)

    def function(value: np.ndarray) -> np.ndarray:
        whole = _INTEGER_ROUNDINGS[rounding](_to_f64(value, source))
        inside = (whole >= low) & (whole < float(high) + (1.0 if high < 1 << 53 else 0.0))
        safe = np.where(inside, whole, 0.0)
        result = (safe.astype(np.uint64) if dtype == np.uint64 else safe.astype(np.int64)).astype(dtype)
        limit = np.where(whole > 0, np.array(high, dtype), np.array(low, dtype))
        limit = np.where(np.isnan(whole), np.array(nan, np.uint64).astype(dtype), limit)
        return np.where(inside, result, limit)

    return function


def _integer_to_integer(kind: str, source: str, clamp: bool) -> Callable:
    dtype, from_dtype = np.dtype(DTYPES[kind]), np.dtype(DTYPES[source])
    if not clamp:
        return lambda value: value.astype(dtype)
    low, high = max(_range(dtype)[0], _range(from_dtype)[0]), min(_range(dtype)[1], _range(from_dtype)[1])
    return lambda value: np.clip(value, from_dtype.type(low), from_dtype.type(high)).astype(dtype)


def _integer_to_float(kind: str, source: str, mode: str) -> Callable:
    wide = source in ("u64", "s64")

    def function(value: np.ndarray) -> np.ndarray:
        if not wide:
            exact, residual = value.astype(np.float64), None
        else:  # 64 bits do not fit a float64: split in halves that do
            high = (value >> value.dtype.type(32)).astype(np.float64) * 2.0**32
            low = (value & value.dtype.type(0xFFFFFFFF)).astype(np.float64)
            exact, residual = two_sum(high, low)
        if kind == "bf16":
            return to_bf16(exact, mode, residual)
        if kind == "f64":
            if mode == "rn" or residual is None:
                return exact
            step = {"rz": (residual * exact < 0), "rm": residual < 0, "rp": residual > 0}[mode]
            toward = {
                "rz": np.zeros_like(exact),
                "rm": np.full_like(exact, -np.inf),
                "rp": np.full_like(exact, np.inf),
            }[mode]
            return np.where(step, np.nextafter(exact, toward), exact)
        return narrow(exact, residual, DTYPES[kind], mode)

    return function


def _float_to_float(kind: str, source: str, mode: str | None, whole: str | None) -> Callable:
    def function(value: np.ndarray) -> np.ndarray:
        exact = _to_f64(value, source)
        if whole:
            exact = _INTEGER_ROUNDINGS[whole](exact)
        if kind == "bf16":
            return to_bf16(exact, mode or "rn")
        if kind == "f64":
            return exact
        return narrow(exact, None, DTYPES[kind], mode or "rn")

    return function


def _tf32(value: np.ndarray, mode: str) -> np.ndarray:
    """float32 rounded to 10 mantissa bits; .rna rounds halves away from zero."""
    bits = value.view(np.uint32)
    add = (
        np.uint32(0x1000)
        if mode == "rna"
        else np.uint32(0x0FFF) + (bits >> np.uint32(13) & np.uint32(1))
        if mode == "rn"
        else np.uint32(0)
    )
    rounded = (bits + add) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), np.where(np.isinf(value), bits, rounded))


def _limits(kind: str) -> float:
    return 65504.0 if kind.startswith("f16") else float(from_bf16(np.array([0x7F7F], np.uint16))[0])


@instruction("cvt")
def _cvt(machine: Machine, ins: Instruction) -> Action:
    allow(
        machine,
        ins,
        *ROUNDINGS,
        *_INTEGER_ROUNDINGS,
        "rna",
        "ftz",
        "sat",
        "relu",
        "satfinite",
        "pack",
        "s4",
        "u4",
        "s2",
        "u2",
    )
    if "pack" in ins.modifiers:
        return _pack_integers(machine, ins)
    kind, source = types(ins)[:2]
    mode = next((m for m in ins.modifiers if m in ROUNDINGS or m == "rna"), None)
    whole = next((m for m in ins.modifiers if m in _INTEGER_ROUNDINGS), None)
    clamp, relu, finite = "sat" in ins.modifiers, "relu" in ins.modifiers, "satfinite" in ins.modifiers
    if kind in ("f16x2", "bf16x2"):
        return _pack_halves(machine, ins, kind, mode or "rn", relu, finite)
    if kind not in DTYPES or source not in DTYPES or source in ("f16x2", "bf16x2"):
        raise machine.unsupported(f"cvt.{kind}.{source}")
    if kind == "tf32":
        function: Callable = lambda v: _tf32(v, mode or "rna")  # noqa: E731
    elif _is_float(kind) and _is_float(source):
        function = _float_to_float(kind, source, mode, whole)
    elif _is_float(kind):
        function = _integer_to_float(kind, source, mode or "rn")
    elif _is_float(source):
        function = _float_to_integer(kind, source, whole or "rzi")
    else:
        function = _integer_to_integer(kind, source, clamp)
    if "ftz" in ins.modifiers:
        inner = function
        function = lambda v: _flush_any(inner(_flush_any(v)))  # noqa: E731
    if clamp and _is_float(kind):
        unclipped = function
        function = lambda v: _clip_unit(unclipped(v), kind)  # noqa: E731
    if (relu or finite) and kind != "tf32":
        rounded = function
        function = lambda v: _relu_finite(rounded(v), kind, relu, finite)  # noqa: E731
    return elementwise(function, machine.destination(ins.operands[0], kind), machine.source(ins.operands[1], source))


def _flush_any(value: np.ndarray) -> np.ndarray:
    return flush(value) if value.dtype == np.float32 else value


def _clip_unit(value: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(saturate(from_bf16(value))) if kind == "bf16" else saturate(value)


def _relu_finite(value: np.ndarray, kind: str, relu: bool, finite: bool) -> np.ndarray:
    number = _to_f64(value, kind)
    if finite:
        number = np.clip(number, -_limits(kind), _limits(kind))
    if relu:
        number = np.where(np.isnan(number), number, np.maximum(number, 0.0))
    return to_bf16(number) if kind == "bf16" else number.astype(DTYPES[kind])


def _pack_halves(machine: Machine, ins: Instruction, kind: str, mode: str, relu: bool, finite: bool) -> Action:
    half = kind[:-2]
    one = _float_to_float(half, "f32", mode, None)
    if relu or finite:
        convert: Callable = lambda v: _relu_finite(one(v), half, relu, finite)  # noqa: E731
    else:
        convert = one
    upper, lower = (machine.source(o, "f32") for o in ins.operands[1:3])

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        low, high = (convert(v).view(np.uint16).astype(np.uint32) for v in (b, a))
        return high << np.uint32(16) | low

    return elementwise(function, machine.destination(ins.operands[0], kind), upper, lower)


def _pack_integers(machine: Machine, ins: Instruction) -> Action:
    """cvt.pack.sat: two int32 saturated to 16, 8, 4 or 2 bits; of three operands the last supplies the upper bits,
    shifted up."""
    name = ins.modifiers[ins.modifiers.index("sat") + 1]
    bits, low = int(name[1:]), 0 if name[0] == "u" else -(1 << int(name[1:]) - 1)
    high = low + (1 << bits) - 1
    a, b = (machine.source(o, "s32") for o in ins.operands[1:3])
    rest = [machine.source(o, "b32") for o in ins.operands[3:]]

    def function(x: np.ndarray, y: np.ndarray, *above: np.ndarray) -> np.ndarray:
        upper, lower = (np.clip(v.astype(np.int64), low, high) & ((1 << bits) - 1) for v in (x, y))
        packed = (upper << bits | lower).astype(np.uint32)
        return above[0] << np.uint32(2 * bits) | packed if above else packed

    return elementwise(function, machine.destination(ins.operands[0], "b32"), a, b, *rest)
