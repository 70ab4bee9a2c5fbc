"""Floating-point arithmetic of float16, bfloat16, float32 and float64, packed pairs included.

Half formats are computed in float64 and rounded once; float32 fma is rounded once; .approx functions are computed in
float64 and rounded, which is more exact than hardware is.

Source: PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Action, allow, instruction, types
from .integer_ops import integer
from .machine import DTYPES, Machine, elementwise
from .rounding import (
    ROUNDINGS,
    flush,
    fma_f32,
    from_bf16,
    maximum,
    minimum,
    narrow,
    saturate,
    to_bf16,
    two_product,
    two_sum,
)
from .syntax import Instruction

_F64 = np.float64
HALF = {"f16": "f16", "f16x2": "f16", "bf16": "bf16", "bf16x2": "bf16"}
_FUNCTIONS: dict[str, Callable] = {
    "rcp": lambda x: 1.0 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1.0 / np.sqrt(x), "sin": np.sin, "cos": np.cos,
    "lg2": np.log2, "ex2": np.exp2, "tanh": np.tanh,
}  # fmt: skip
_KNOWN = (*ROUNDINGS, "ftz", "sat", "relu", "NaN", "xorsign", "abs", "approx", "full", "noftz", "oob")


def widen(value: np.ndarray, kind: str) -> np.ndarray:
    """A half operand in float64; packed operands as (lanes, 2)."""
    if kind.endswith("x2"):
        value = np.ascontiguousarray(value).view(np.uint16).reshape(len(value), 2)
        return (value.view(np.float16) if kind == "f16x2" else from_bf16(value)).astype(_F64)
    return (value if kind == "f16" else from_bf16(value)).astype(_F64)


def _half(value: np.ndarray, kind: str, residual: np.ndarray | None = None) -> np.ndarray:
    """float64 to the bits or values that a half destination takes."""
    if kind.startswith("bf16"):
        bits = to_bf16(value, residual=residual)
    else:
        bits = narrow(value, residual, np.float16).view(np.uint16)
    if kind.endswith("x2"):
        return np.ascontiguousarray(bits).view(np.uint32).reshape(-1)
    return bits.view(np.float16) if kind == "f16" else bits


def _half_function(op: str, ins: Instruction) -> Callable:
    """An operation on float64 images of half operands, giving (value, residual)."""
    keep_nan = "NaN" in ins.modifiers
    if op in ("fma", "mad"):

        def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
            total, residual = two_sum(a * b, c)
            if "relu" in ins.modifiers:
                total = np.where(np.isnan(total), total, np.maximum(total, 0.0))
            return total, residual

        return fma
    simple: dict[str, Callable] = {
        "add": two_sum, "sub": lambda a, b: two_sum(a, -b), "mul": lambda a, b: (a * b, None),
        "min": lambda a, b: (minimum(a, b, keep_nan), None), "max": lambda a, b: (maximum(a, b, keep_nan), None),
        **{name: (lambda a, f=f: (f(a), None)) for name, f in _FUNCTIONS.items()},
    }  # fmt: skip
    return simple[op]


def _half_sign(machine: Machine, ins: Instruction, kind: str) -> Action:
    """neg and abs change the sign bits alone."""
    bits = "b32" if kind.endswith("x2") else "b16"
    sign = machine.constant(0x80008000, bits)
    sources = machine.source(ins.operands[1], bits), sign if ins.opcode == "neg" else ~sign
    change = np.bitwise_xor if ins.opcode == "neg" else np.bitwise_and
    return elementwise(change, machine.destination(ins.operands[0], bits), *sources)


def _half_op(machine: Machine, ins: Instruction, kind: str) -> Action:
    allow(machine, ins, *(k for k in _KNOWN if k not in ("rz", "rm", "rp", "xorsign", "abs", "oob")))
    if ins.opcode in ("neg", "abs"):
        return _half_sign(machine, ins, kind)
    function, saturated = _half_function(ins.opcode, ins), "sat" in ins.modifiers
    sources = [machine.source(o, kind) for o in ins.operands[1:]]

    def run(*operands: np.ndarray) -> np.ndarray:
        value, residual = function(*(widen(o, kind) for o in operands))
        if saturated:
            value = saturate(value)
        return _half(value, kind, residual)

    return elementwise(run, machine.destination(ins.operands[0], kind), *sources)


def _saturated(function: Callable) -> Callable:
    return lambda *operands: saturate(function(*operands))


def _flushed(function: Callable) -> Callable:
    return lambda *operands: flush(function(*(flush(o) for o in operands)))


def _f32_function(op: str, mode: str, ins: Instruction) -> Callable:
    keep_nan = "NaN" in ins.modifiers
    if op in ("fma", "mad"):
        return lambda a, b, c: fma_f32(a, b, c, mode)
    if op in ("min", "max"):
        pick = minimum if op == "min" else maximum
        if "xorsign" in ins.modifiers:
            return lambda a, b: np.copysign(
                pick(np.abs(a), np.abs(b), keep_nan), np.where(np.signbit(a) ^ np.signbit(b), a.dtype.type(-1), 1)
            )
        return lambda a, b: pick(a, b, keep_nan)
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs}
    if op in plain and (mode == "rn" or op in ("neg", "abs")):
        return plain[op]
    if op in ("add", "sub"):
        sign = 1.0 if op == "add" else -1.0
        return lambda a, b: narrow(*two_sum(a.astype(_F64), sign * b.astype(_F64)), np.float32, mode)
    if op in ("mul", "div"):
        exact = np.multiply if op == "mul" else np.divide
        return lambda a, b: narrow(exact(a.astype(_F64), b.astype(_F64)), None, np.float32, mode)
    function = _FUNCTIONS[op]
    return lambda a: narrow(function(a.astype(_F64)), None, np.float32, mode)


def _fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product, low = two_product(a, b)
    total, rest = two_sum(product, c)
    correction = low + rest
    return np.where(np.isfinite(total), np.where(correction == 0, total, total + correction), a * b + c)


def _f64_function(machine: Machine, op: str, mode: str) -> Callable:
    if mode != "rn":
        raise machine.unsupported(f"float64 arithmetic rounded .{mode}")
    if op in ("fma", "mad"):
        return _fma_f64
    plain: dict[str, Callable] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
        "min": lambda a, b: minimum(a, b, False), "max": lambda a, b: maximum(a, b, False),
    }  # fmt: skip
    return plain[op] if op in plain else _FUNCTIONS[op]


@instruction("add", "sub", "mul", "fma", "mad", "div", "rem", "min", "max", "neg", "abs",
             "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")  # fmt: skip
def _arithmetic(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    if kind in HALF:
        return _half_op(machine, ins, kind)
    if kind not in ("f32", "f64"):
        return integer(machine, ins)
    allow(machine, ins, *_KNOWN)
    mode = next((m for m in ins.modifiers if m in ROUNDINGS), "rn")
    if len(types(ins)) > 1:
        raise machine.unsupported("mixed-precision arithmetic")
    if kind == "f64":
        function = _f64_function(machine, ins.opcode, mode)
    else:
        function = _f32_function(ins.opcode, mode, ins)
    if "sat" in ins.modifiers:
        function = _saturated(function)
    if "ftz" in ins.modifiers and kind == "f32":
        function = _flushed(function)
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    return elementwise(function, machine.destination(ins.operands[0], kind), *sources)


@instruction("copysign")
def _copysign(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    sources = [machine.source(o, kind) for o in ins.operands[1:]]
    return elementwise(lambda a, b: np.copysign(b, a), machine.destination(ins.operands[0], kind), *sources)


@instruction("testp")
def _testp(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    tiny = np.finfo(DTYPES[kind]).tiny
    test = next(m for m in ins.modifiers if m != kind)
    tests: dict[str, Callable] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny), "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }  # fmt: skip
    return elementwise(tests[test], machine.destination(ins.operands[0], "pred"), machine.source(ins.operands[1], kind))
