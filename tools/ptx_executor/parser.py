"""PTX text to kernels, functions, variables and instructions.

Source: PTX ISA, chapters "Syntax" and "Directives".
"""

from __future__ import annotations

import bisect
import functools
import re
import struct
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import PtxSyntaxError
from .syntax import (
    SPACES,
    TYPE_BYTES,
    Address,
    Function,
    Immediate,
    Instruction,
    Not,
    Pair,
    ParsedModule,
    Register,
    Special,
    Symbol,
    Variable,
    Vector,
    encode,
)

_IDENT = r"[A-Za-z_$%][\w$]*"
_STATEMENT = re.compile(r"[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;", re.S)
_INSTRUCTION = re.compile(rf"(?:@(!?)\s*({_IDENT})\s+)?\s*([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", re.S)
_NAME = re.compile(rf"({_IDENT}(?:\.[xyzw])?)\s*(?:\+\s*(-?\w+))?")
_ADDRESS = re.compile(rf"({_IDENT}|-?\w+)\s*(?:([+-])\s*(-?\w+))?")
_FLOAT32, _FLOAT64 = re.compile(r"(-?)0[fF]([0-9a-fA-F]{8})"), re.compile(r"(-?)0[dD]([0-9a-fA-F]{16})")
_INTEGER = re.compile(r"([-~]?)\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][+-]?\d+)?|-?\d+[eE][+-]?\d+")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SCOPED_NAME = re.compile(rf"({_IDENT})(?:<(\d+)>)?")
_VARIABLE = re.compile(
    rf"(?:\.(?P<space>{'|'.join(SPACES)})\s*)?(?:\.align\s+(?P<a1>\d+)\s*)?\.(?P<vec>v[24]\s*\.)?(?P<type>[bsuf]\w+|bf16)\s*"
    rf"(?:\.ptr(?:\s*\.(?:{'|'.join(SPACES)}))?(?:\s*\.align\s+\d+)?\s*)?(?:\.align\s+(?P<a2>\d+)\s*)?"
    rf"(?P<name>{_IDENT})(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$", re.S,
)  # fmt: skip
_SPECIAL = re.compile(r"%(?:(?:n?tid|n?ctaid)\.[xyzw]|laneid|n?warpid|n?smid|gridid|lanemask_\w+|clock\w*|"
                      r"globaltimer\w*|pm\d+|envreg\d+|dynamic_smem_size|total_smem_size|aggr_smem_size)$")  # fmt: skip


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_SPACE = re.compile(r"\s*")


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.S)


class _Parser:
    def __init__(self, text: str) -> None:
        blank = lambda m: re.sub(r"[^\n]", " ", m.group())  # noqa: E731
        self.text = _COMMENT.sub(blank, text)
        self.pos = 0
        # nvcc names the files at the end
        self.files = {m.group(1): Path(m.group(2)).name for m in _FILE.finditer(self.text)}
        self.source = ""
        self.module = ParsedModule("", {}, {})
        self._line_starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.registers: dict[str, str] = {}  # of the function being parsed
        self._scope_count = 0

    def line_of(self, pos: int) -> int:
        return bisect.bisect_right(self._line_starts, pos)

    def error(self, message: str) -> PtxSyntaxError:
        return PtxSyntaxError(self.line_of(self.pos), message)

    def skip_space(self) -> None:
        self.pos = _SPACE.match(self.text, self.pos).end()  # type: ignore[union-attr]

    def take(self, pattern: str) -> re.Match[str] | None:
        m = _compiled(pattern).match(self.text, self.pos)
        if m:
            self.pos = m.end()
        return m

    # ---- module level ----------------------------------------------------------------------------------------------
    def parse(self) -> ParsedModule:
        linkage = r"(?:\.(?:visible|extern|weak|common)\s+)*"
        while True:
            self.skip_space()
            if self.pos >= len(self.text):
                break
            if m := self.take(r"\.target\s+([\w, ]+)\n"):
                self.module.target = m.group(1).split(",")[0].strip()
            elif (
                self.take(r"\.(?:version|address_size|loc|file)[^\n]*")
                or self.take(r"\.section\s+\S+\s*\{[^}]*\}")
                or self.take(r"\.pragma[^;]*;|\.alias[^;]*;")
            ):
                pass
            elif m := self.take(linkage + r"\.(entry|func)\b"):
                self.function(m.group(1) == "entry")
            elif m := self.take(rf"({linkage})(?=\.(?:global|const|shared)\b)([^;]*);"):
                self.declare(m.group(2), self.module.variables, ".extern" in m.group(1))
            else:
                raise self.error(f"cannot parse {self.text[self.pos : self.pos + 60]!r}")
        if not self.module.target:
            raise self.error("no .target directive")
        return self.module

    def declare(self, text: str, into: dict[str, Variable], extern: bool = False, rename: str = "") -> Variable:
        m = _VARIABLE.match(text.strip())
        if not m or m["type"] not in TYPE_BYTES:
            raise self.error(f"cannot parse the declaration {text.strip()!r}")
        unit = TYPE_BYTES[m["type"]] * (int(m["vec"][1]) if m["vec"] else 1)
        dims = [int(d) if d else 0 for d in re.findall(r"\[(\d*)\]", m["dims"])]
        count = 1
        for d in dims:
            count *= d
        variable = Variable(
            rename or m["name"],
            m["space"] or "param",
            unit * count,
            int(m["a1"] or m["a2"] or unit),
            m["type"],
            extern=extern,
        )
        if m["init"]:
            self.initialise(variable, m["init"], m["type"])
        into[m["name"]] = variable
        return variable

    def initialise(self, variable: Variable, text: str, kind: str) -> None:
        unit, data = TYPE_BYTES[kind], bytearray(variable.size)
        items = [i.strip() for i in re.sub(r"[{}]", "", text).split(",") if i.strip()]
        for k, item in enumerate(items):
            value = self.operand(item, {})
            if isinstance(value, Symbol):
                variable.references.append((k * unit, value))
            else:
                data[k * unit : (k + 1) * unit] = encode(value.value, kind)
        variable.initial = bytes(data)

    # ---- functions -------------------------------------------------------------------------------------------------
    def parameter_list(self) -> list[Variable]:
        self.skip_space()
        m = self.take(r"\(([^()]*)\)")
        if not m:
            return []
        scope: dict[str, Variable] = {}
        return [self.declare(part, scope) for part in m.group(1).split(",") if part.strip()]

    def function(self, is_kernel: bool) -> None:
        results = [] if is_kernel else self.parameter_list()
        self.skip_space()
        name = self.take(_IDENT)
        if not name:
            raise self.error("a function without a name")
        fn = Function(name.group(), is_kernel, self.parameter_list(), results)
        while True:
            self.skip_space()
            if m := self.take(r"\.(maxntid|reqntid|minnctapersm|maxnreg|maxnctapersm|noreturn|pragma|unique\w*)\b([^{;.]*)"):
                fn.directives[m.group(1)] = [int(v) for v in re.findall(r"\d+", m.group(2))]
            elif self.take(r";"):
                return  # a declaration only
            elif self.take(r"\{"):
                break
            else:
                raise self.error(f"cannot parse {self.text[self.pos : self.pos + 60]!r}")
        self.module.functions[fn.name] = fn
        self.registers = fn.registers
        self.body(fn)

    def body(self, fn: Function) -> None:
        scopes: list[dict[str, str]] = [{}]  # declared name -> unique name
        while True:
            self.skip_space()
            if self.take(r"\{"):
                scopes.append({})
                self._scope_count += 1
            elif self.take(r"\}"):
                scopes.pop()
                if not scopes:
                    return
            elif m := self.take(r"\.loc\s+(\d+)\s+(\d+)[^\n]*"):
                self.source = f"{self.files.get(m.group(1), '?')}:{m.group(2)}"
            elif self.take(r"\.pragma[^;]*;"):
                pass
            elif m := self.take(rf"({_IDENT})\s*:\s*\.branchtargets\s+([^;]*);"):
                fn.branch_tables[m.group(1)] = [label.strip() for label in m.group(2).split(",")]
            elif m := self.take(r"\.reg\s*\.(?:(v[24])\s*\.)?(\w+)\s+([^;]*);"):
                if m.group(1):
                    raise self.error("vector registers are not supported; load into a list of scalar registers")
                self.declare_registers(fn, scopes, m.group(2), m.group(3))
            elif m := self.take(r"(?=\.(?:param|local|shared|const|global)\b)([^;]*);"):
                declared: dict[str, Variable] = {}
                variable = self.declare(m.group(1), declared)
                (name,) = declared
                variable.name = f"{name}#{fn.name}#{self._scope_count}" if len(scopes) > 1 else f"{name}#{fn.name}"
                scopes[-1][name] = variable.name
                fn.variables[variable.name] = variable
            elif m := self.take(rf"({_IDENT})\s*:"):
                fn.labels[m.group(1)] = len(fn.body)
            else:
                self.instruction(fn, scopes)

    def declare_registers(self, fn: Function, scopes: list, kind: str, names: str) -> None:
        suffix = f"#{self._scope_count}" if len(scopes) > 1 else ""
        for item in names.split(","):
            m = _SCOPED_NAME.match(item.strip())
            if not m or kind not in TYPE_BYTES:
                raise self.error(f"cannot parse the register declaration {names!r}")
            for n in [m.group(1)] if m.group(2) is None else [f"{m.group(1)}{k}" for k in range(int(m.group(2)))]:
                scopes[-1][n] = n + suffix
                fn.registers[n + suffix] = kind

    def instruction(self, fn: Function, scopes: list[dict[str, str]]) -> None:
        m = _STATEMENT.match(self.text, self.pos)
        if not m:
            raise self.error(f"cannot parse {self.text[self.pos : self.pos + 60]!r}")
        line, raw = self.line_of(self.pos), m.group()[:-1]
        names: Mapping[str, str] = scopes[0] if len(scopes) == 1 else ChainMap(*reversed(scopes))
        head = _INSTRUCTION.match(raw)
        if not head:
            raise self.error(f"cannot parse the instruction {raw!r}")
        self.pos = m.end()
        guard = Register(names.get(head.group(2), head.group(2))) if head.group(2) else None
        modifiers = tuple(part.split("::")[0] if part.startswith("shared::") else part for part in head.group(4).split(".")[1:])
        operands = [self.operand(o, names) for o in split_operands(head.group(5))]
        text = " ".join(raw.split())
        fn.body.append(Instruction(head.group(3), modifiers, operands, guard, bool(head.group(1)), line, text, self.source))

    # ---- operands --------------------------------------------------------------------------------------------------
    def operand(self, text: str, names: Mapping[str, str]) -> Any:
        t = text.strip()
        if names.get(t) in self.registers:
            return Register(names[t])
        if t.startswith("["):
            return self.address(t[1:-1].strip(), names)
        if t.startswith("{") or t.startswith("("):
            return Vector(tuple(self.operand(e, names) for e in split_operands(t[1:-1])))
        if "|" in t:
            return Pair(*(self.operand(e, names) for e in t.split("|")))
        if t == "_":
            return None
        if t.startswith("!"):
            return Not(Register(names.get(t[1:].strip(), t[1:].strip())))
        number = parse_number(t)
        if number is not None:
            return Immediate(number)
        m = _NAME.fullmatch(t)
        if not m:
            raise self.error(f"cannot parse the operand {t!r}")
        name, offset = m.group(1), parse_number(m.group(2)) if m.group(2) else 0
        if name in names:
            unique = names[name]
            return Register(unique) if unique in self.registers else Symbol(unique, int(offset or 0))
        if _SPECIAL.match(name) or name == "WARP_SZ":
            return Special(name.lstrip("%"))
        return Symbol(name, int(offset or 0))

    def address(self, text: str, names: Mapping[str, str]) -> Address:
        m = _ADDRESS.fullmatch(text)
        if not m:
            raise self.error(f"cannot parse the address [{text}]")
        offset = int(parse_number(m.group(3)) or 0) if m.group(3) else 0
        if m.group(2) == "-":
            offset = -offset
        number = parse_number(m.group(1))
        if number is not None:
            return Address(None, int(number) + offset)
        base = self.operand(m.group(1), names)
        return Address(base, offset)


def split_operands(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for k, ch in enumerate(text):
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        elif ch == "," and depth == 0:
            parts.append(text[start:k])
            start = k + 1
    parts.append(text[start:])
    return [p for p in (p.strip() for p in parts) if p]


def parse_number(text: str) -> int | float | None:
    """The value of a PTX integer or floating-point literal, or None."""
    if m := _INTEGER.fullmatch(text):
        digits = m.group(2)
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        value = int(digits, 8 if octal else 0)
        return -value if m.group(1) == "-" else ~value if m.group(1) == "~" else value
    for pattern, code in ((_FLOAT32, ">f"), (_FLOAT64, ">d")):
        if m := pattern.fullmatch(text):
            (number,) = struct.unpack(code, bytes.fromhex(m.group(2)))
            return -number if m.group(1) else number
    return float(text) if _DECIMAL.fullmatch(text) else None


def parse(text: str) -> ParsedModule:
    """Parse a PTX module.

    Raises:
        PtxSyntaxError: the text is not PTX, or uses a directive the executor does not know.
    """
    return _Parser(text).parse()
