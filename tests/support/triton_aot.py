"""Ahead-of-time compilation of the Triton kernels, and what is read off the result: registers, spills, instructions."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton import configs
from resnet_fused.backends.triton.configs import Chip, Plan, Tile
from resnet_fused.backends.triton.prepare import module_of
from support.problems import problem_of

# Shared memory of one program at most: CUDA C++ Programming Guide, table of technical specifications per compute
# capability; on AMD, LDS by the CDNA 3 ISA.
CHIPS = {
    75: Chip("cuda", 75, 40, 64 << 10),
    80: Chip("cuda", 80, 108, 163 << 10),
    86: Chip("cuda", 86, 84, 99 << 10),
    89: Chip("cuda", 89, 128, 99 << 10),
    90: Chip("cuda", 90, 132, 227 << 10),
    100: Chip("cuda", 100, 148, 227 << 10),
    120: Chip("cuda", 120, 170, 99 << 10),
    "gfx942": Chip("hip", 0x942, 304, 64 << 10),
}
Arch = int | str


class Usage(NamedTuple):
    """What ptxas gave a kernel: registers of a thread, and bytes stored and loaded because they were too few."""

    registers: int
    spilled_bytes: int


def problem(
    op: str,
    shape: tuple[int, int, int, int],
    k: int,
    size: int,
    stride: int = 1,
    dtype: torch.dtype = torch.float16,
    groups: int = 1,
) -> Problem:
    """A size×size convolution to k channels, padded as ResNets do."""
    conv = Conv(shape[1], k, (size, size), (stride,) * 2, (size // 2,) * 2, groups=groups)
    return problem_of(op, shape, dtype, torch.device("cpu"), (conv,))


def plan(tile: Tile, problem: Problem, splits: int = 1) -> Plan:
    """The tile applied to the problem, whether the heuristic would or not."""
    (conv,) = problem.convs
    walk = configs.walk_of(problem)
    return Plan(tile, walk, configs.row_lanes(conv) if walk in (configs.ROWS, configs.PAIRS) else tile.k, splits)


def compile_conv(problem: Problem, plan: Plan, arch: Arch, tf32: bool = False) -> Any:
    """The convolution kernel (its first one, with splits) compiled for a chip."""
    return module_of(plan).launches(problem, plan, CHIPS[arch], tf32)[0].compile(target(arch))


def target(arch: Arch) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def ptxas(compiled: Any, arch: int) -> Usage:
    """Registers and spills of a compiled kernel, by the ptxas that comes with Triton."""
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [tool.path, "-v", f"-arch=sm_{arch}{suffix}", str(source), "-o", str(source.with_suffix(".cubin"))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", output)
    ((stores, loads),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    return Usage(int(registers), int(stores) + int(loads))


def spilled_registers(compiled: Any) -> int:
    """Vector registers that an AMD kernel keeps in memory."""
    (count,) = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    return int(count)


def instructions(ptx: str) -> list[str]:
    """The instructions of a PTX text in order, one a string, without labels and directives."""
    return [line.strip().rstrip(";") for line in ptx.splitlines() if re.match(r"\s+(@!?%p\d+\s+)?[a-z][\w.:]+[\s;]", line)]


def loops(ptx: str) -> list[list[str]]:
    """The instructions of each loop."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)?\s+(\$L\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            found.append(instructions("\n".join(lines[labels[jump[1]] : i + 1])))
    return found


def main_loop(ptx: str) -> list[str]:
    """The instructions of the innermost loop with a matrix instruction (or the most fma, where there is none)."""
    return max(loops(ptx), key=lambda loop: sum(("mma" in x or "fma" in x) for x in loop) / len(loop) if loop else 0)


def opcodes(code: list[str]) -> collections.Counter[str]:
    """How often each instruction occurs, by its full name."""
    return collections.Counter(re.sub(r"^@!?%p\d+\s+", "", line).split()[0] for line in code)


def overwritten(loop: list[str]) -> list[str]:
    """The instructions of a loop that write registers of a wgmma before it is waited for.

    The hardware reads and writes them while the threads run on (PTX ISA, "wgmma.mma_async"), and so into the next turn.
    """
    groups: list[set[str]] = [set()]  # those that were committed, and the one that is being made
    found = []
    for line in loop * 2:
        operation, _, operands = re.sub(r"^@!?%p\d+\s+", "", line).partition(" ")
        if operation.startswith("wgmma.mma_async"):
            groups[-1] |= set(re.findall(r"%\w+", operands))
        elif operation.startswith("wgmma.commit_group"):
            groups.append(set())
        elif operation.startswith("wgmma.wait_group"):
            groups = groups[len(groups) - 1 - min(int(operands), len(groups) - 1) :]
        elif not operation.startswith(("st.", "cp.", "bar.", "bra")):
            written = re.match(r"\{[^}]*\}|[^,]+", operands.strip())
            if written and set(re.findall(r"%r\d+", written[0])) & set().union(*groups):
                found.append(line)
    return found
