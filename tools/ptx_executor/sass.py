"""The machine code of a kernel: its instruction mix, and that of its hottest loop."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .toolchain import compile_cubin, find_tool, run_tool

_INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):", re.M)
_TENSOR = ("HMMA", "IMMA", "DMMA")
_ARITHMETIC = ("FFMA", "HFMA2", "DFMA", "IDP")


@dataclass
class SassMix:
    """Machine instructions by full opcode: of the whole kernel, and of the innermost loop that holds most of the
    arithmetic.

    ``loop`` is empty where the kernel has no loop; ``loop_range`` has the byte addresses of its first and last
    instruction.
    """

    kernel: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)
    loop_range: tuple[int, int] | None = None

    def count(self, prefix: str, *, loop: bool = True) -> int:
        """Instructions whose opcode begins with a prefix, such as "HMMA" or "LDSM.16.MT88"."""
        return sum(n for name, n in (self.loop if loop else self.kernel).items() if name.startswith(prefix))


def disassemble(cubin: bytes) -> str:
    """The text that nvdisasm prints for a cubin.

    Raises:
        ToolkitNotFound: there is no nvdisasm.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.cubin"
        path.write_bytes(cubin)
        return run_tool([find_tool("nvdisasm"), "-c", path]).stdout


def sass_mix(ptx: str, arch: str = "sm_80") -> dict[str, SassMix]:
    """Assemble PTX and count the machine instructions of every kernel and of its hottest loop.

    The hottest loop is taken to be the innermost one with the most tensor-core instructions, then the most
    multiply-adds, then the most instructions: a guess made without running anything.

    Raises:
        ToolkitNotFound: ptxas or nvdisasm is missing.
        CompileError: ptxas refuses the PTX.
    """
    parts = re.split(r"^\.text\.(\S+):$", disassemble(compile_cubin(ptx, arch)), flags=re.M)
    return {name: mix_of(text.split(".section", 1)[0]) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def mix_of(text: str) -> SassMix:
    code: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := _INSTRUCTION.search(line):
            if found.group(2).startswith("BRA") and (target := re.search(r"`\((\.L_\w+)\)", found.group(3))):
                branches.append((target.group(1), len(code)))
            code.append((int(found.group(1), 16), found.group(2)))
    while code and code[-1][1] in ("NOP", "BRA"):  # the padding after the last exit
        code.pop()
    mix = SassMix(Counter(name for _, name in code))
    loops = [(labels[name], at) for name, at in branches if labels.get(name, at + 1) <= at < len(code)]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if innermost:
        start, end = max(innermost, key=lambda loop: _heat([name for _, name in code[loop[0] : loop[1] + 1]]))
        mix.loop = Counter(name for _, name in code[start : end + 1])
        mix.loop_range = (code[start][0], code[end][0])
    return mix


def _heat(names: list[str]) -> tuple[int, int, int]:
    return sum(n.startswith(_TENSOR) for n in names), sum(n.startswith(_ARITHMETIC) for n in names), len(names)
