"""The class of an instruction, and the floating-point operations it stands for."""

from __future__ import annotations

import re

from .syntax import SPACES, TYPE_BYTES, Instruction

_SPECIAL_FUNCTIONS = {"rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh"}
_FIXED = {
    **dict.fromkeys(("bra", "brx", "call", "ret", "exit", "trap"), "control"),
    **dict.fromkeys(("shfl", "vote", "match", "redux", "activemask"), "warp"),
    **dict.fromkeys(("fence", "membar"), "fence"),
    **dict.fromkeys(("mov", "selp", "prmt", "cvta", "isspacep"), "move"),
    **dict.fromkeys(("setp", "set"), "compare"),
    **{op: op for op in ("ldmatrix", "stmatrix", "movmatrix")},
    "cvt": "convert", "cp": "cp_async",
}  # fmt: skip
_FLOPS = {
    "f32": ("fp32", 1),
    "f64": ("fp64", 1),
    "f16": ("fp16", 1),
    "bf16": ("fp16", 1),
    "f16x2": ("fp16", 2),
    "bf16x2": ("fp16", 2),
}


_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_TENSOR_TYPES = {"f16", "bf16", "tf32", "f32", "f64", "s8", "u8", "s4", "u4", "s32"}


def type_of(ins: Instruction) -> str:
    """The last type modifier, '' where there is none."""
    return next((m for m in reversed(ins.modifiers) if m in TYPE_BYTES), "")


def classify(ins: Instruction) -> str:
    """The class an instruction is counted in."""
    op = ins.opcode
    if op in _FIXED:
        return _FIXED[op]
    space = next((m for m in ins.modifiers if m in SPACES), "generic")
    if op in ("mma", "wmma"):
        return "tensor" if op == "mma" or "mma" in ins.modifiers else "wmma_load_store"
    if op in ("ld", "ldu"):
        return f"{space}_load"
    if op == "st":
        return f"{space}_store"
    if op in ("atom", "red"):
        return f"{space}_atomic"
    if op in ("bar", "barrier"):
        return "warp" if "warp" in ins.modifiers else "barrier"
    kind = type_of(ins)
    if op in _SPECIAL_FUNCTIONS or (op == "div" and kind.startswith("f")):
        return "special_function"
    if kind == "f32":
        return "fp32"
    if kind == "f64":
        return "fp64"
    if "f16" in kind:
        return "fp16"
    return "predicate" if kind == "pred" else "integer"


def flops_of(ins: Instruction) -> tuple[str, int]:
    """(kind, floating-point operations): of a warp for tensor instructions, else of a thread; ('', 0) where there are
    none."""
    if ins.opcode == "mma" or (ins.opcode == "wmma" and "mma" in ins.modifiers):
        for m in ins.modifiers:
            if shape := _SHAPE.fullmatch(m):
                return "tensor", 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    if ins.opcode in ("add", "sub", "mul", "fma", "mad"):
        kind, count = _FLOPS.get(type_of(ins), ("", 0))
        return kind, count * (2 if ins.opcode in ("fma", "mad") else 1)
    return "", 0


def tensor_name(ins: Instruction) -> str:
    """The shape and types of a tensor instruction, such as 'm16n8k16.f32.f16.f16.f32'."""
    return ".".join(m for m in ins.modifiers if _SHAPE.fullmatch(m) or m in _TENSOR_TYPES)
