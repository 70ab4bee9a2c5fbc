"""printf() of device code.

Source: CUDA C++ Programming Guide, "Formatted Output"; vprintf(format, arguments) with the arguments packed by their
alignment.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from .machine import CONST_WINDOW, LOCAL_START, LOCAL_WINDOW, Machine
from .memory import GLOBAL_BASE

_CONVERSION = re.compile(r"%[-+ #0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(hh|h|ll|l|j|z|t)?([diouxXcsfFeEgGaAp%])")
_INTEGERS = {"i": "d", "u": "d"}


def text_at(machine: Machine, address: int) -> str:
    """The zero-terminated string at a generic address."""
    if address >= CONST_WINDOW:
        content, start = machine.spaces["const"].bytes, address - CONST_WINDOW - 16
    else:
        content, start = machine.memory.data, address - GLOBAL_BASE
    raw = content[start : start + 4096].tobytes()
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def format_message(machine: Machine, format_address: int, arguments: int, lane: int) -> str:
    """What printf prints for one thread."""
    stack = machine.spaces["local"].bytes.reshape(machine.lanes, -1)[lane].tobytes()
    at = arguments - LOCAL_WINDOW - LOCAL_START

    def take(code: str) -> Any:
        nonlocal at
        size = struct.calcsize(code)
        at = -(-at // size) * size
        (value,) = struct.unpack_from(f"<{code}", stack, at)
        at += size
        return value

    def convert(match: re.Match[str]) -> str:
        length, kind = match.groups()
        if kind == "%":
            return "%"
        spec = match.group().replace(length or "", "", 1)
        while "*" in spec:
            spec = spec.replace("*", str(take("i")), 1)
        if kind == "s":
            return spec % text_at(machine, take("Q"))
        if kind in "fFeEgGaA":
            return spec.replace("a", "e").replace("A", "E") % take("d")
        if kind == "p":
            return hex(take("Q"))
        wide, signed = length in ("l", "ll", "j", "z", "t"), kind in "di"
        value = take(("q" if signed else "Q") if wide else ("i" if signed else "I"))
        return spec % (value & 255) if kind == "c" else (spec[:-1] + _INTEGERS.get(kind, kind)) % value

    return _CONVERSION.sub(convert, text_at(machine, format_address))
