"""Finds the CUDA compiler, compiles with it, and reads what ptxas and the disassembler say.

The tools come from the PyPI packages ``cuda-toolkit[nvcc,nvvm,crt,cccl]`` and ``nvidia-cuda-nvdisasm`` or from an installed
CUDA toolkit. Standard library only: importing this module needs neither NumPy nor CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REMEDY = (
    'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl]==13.0.*" "nvidia-cuda-nvdisasm==13.*", or set CUDA_HOME to a CUDA toolkit'
)


class ToolkitNotFound(RuntimeError):
    """A CUDA tool is not installed; the message says which, where it was looked for, and the remedy."""


class CompileError(RuntimeError):
    """A CUDA tool refused its input; the message holds what it printed."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: ``root`` holds bin/ and include/."""

    root: Path
    nvcc: Path
    ptxas: Path

    @property
    def include(self) -> Path:
        return self.root / "include"


@dataclass(frozen=True)
class KernelResources:
    """What ptxas -v says of one kernel: registers of a thread, and bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_bytes: int
    constant_bytes: int
    barriers: int


def package_folders(package: str, *below: str) -> list[Path]:
    """The folders matching a pattern inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return [folder for place in places for folder in sorted(Path(place).glob("/".join(below)), reverse=True)]


def _toolkit_at(root: Path) -> Toolkit | None:
    nvcc, ptxas = root / "bin" / "nvcc", root / "bin" / "ptxas"
    return Toolkit(root, nvcc, ptxas) if nvcc.is_file() and ptxas.is_file() else None


def _toolkit_of(nvcc: str) -> Toolkit | None:
    """The toolkit behind an nvcc of PATH, which may be a link or a script: nvcc itself says where it is at home."""
    answer = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", answer.stdout + answer.stderr, re.M)
    return _toolkit_at(Path(top.group(1).strip()).resolve()) if top else None


def find_toolkit() -> Toolkit:
    """The toolkit to use: CUDA_HOME, else the PyPI packages (site-packages/nvidia/cu*), else the nvcc on PATH.

    Raises:
        ToolkitNotFound: there is none, or CUDA_HOME points to something else.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        toolkit = _toolkit_at(Path(home))
        if toolkit is None:
            raise ToolkitNotFound(f"CUDA_HOME={home!r} has no bin/nvcc and bin/ptxas; correct it, or unset it and {REMEDY}")
        return toolkit
    for folder in package_folders("nvidia", "cu*"):
        if toolkit := _toolkit_at(folder):
            return toolkit
    nvcc = shutil.which("nvcc")
    toolkit = _toolkit_of(nvcc) if nvcc else None
    if toolkit is None:
        raise ToolkitNotFound(f"no nvcc in CUDA_HOME (not set), in site-packages/nvidia/cu*/bin or on PATH; {REMEDY}")
    return toolkit


def find_tool(name: str) -> Path:
    """ptxas or nvdisasm: of the toolkit, of the PyPI packages, on PATH, or the one that Triton brings.

    Raises:
        ToolkitNotFound: it is nowhere.
    """
    folders = []
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    folders += package_folders("nvidia", "cu*", "bin")
    on_path = shutil.which(name)
    if on_path:
        folders.append(Path(on_path).parent)
    folders += package_folders("triton", "backends", "nvidia", "bin")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ToolkitNotFound(f"{name} is not installed; {REMEDY}")


def run_tool(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if answer.returncode:
        output = (answer.stderr + answer.stdout).strip()
        raise CompileError(f"{Path(command[0]).name} failed ({answer.returncode}): {' '.join(map(str, command))}\n{output}")
    return answer


def compile_ptx(source: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """Compile CUDA C++ to PTX.

    Args:
        source: the path of a .cu or .cuh file, or CUDA C++ text (anything with a line break).
        arch: such as "sm_80".
        flags: for nvcc, such as "-DTILE=64" or "-Iinclude"; -std=c++17 unless they name a standard.

    Raises:
        ToolkitNotFound: there is no nvcc.
        CompileError: the source does not compile.
    """
    standard = () if any(f.startswith(("-std", "--std")) for f in flags) else ("-std=c++17",)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if isinstance(source, Path) or "\n" not in source else Path(folder) / "source.cu"
        if path.parent == Path(folder):
            path.write_text(str(source))
        out = Path(folder) / "out.ptx"
        run_tool([find_toolkit().nvcc, "-x", "cu", "-ptx", f"-arch={arch}", *standard, *flags, path, "-o", out])
        return out.read_text()


def compile_cubin(ptx: str, arch: str = "sm_80") -> bytes:
    """Assemble PTX to a cubin.

    Raises:
        ToolkitNotFound: there is no ptxas.
        CompileError: ptxas refuses the PTX.
    """
    return _assemble(ptx, arch)[0]


def _assemble(ptx: str, arch: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "in.ptx", Path(folder) / "out.cubin"
        text.write_text(ptx)
        answer = run_tool([find_tool("ptxas"), "-v", f"-arch={arch}", text, "-o", out])
        return out.read_bytes(), answer.stderr + answer.stdout


_FIGURES = {
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "registers": r"Used (\d+) registers",
    "barriers": r"used (\d+) barriers",
    "shared_bytes": r"(\d+) bytes smem",
    "constant_bytes": r"(\d+) bytes cmem\[0\]",
}


def ptxas_info(ptx: str, arch: str = "sm_80") -> dict[str, KernelResources]:
    """Registers, spills, stack and shared memory of every kernel of a PTX module.

    Raises:
        ToolkitNotFound: there is no ptxas.
        CompileError: ptxas refuses the PTX.
    """
    _, report = _assemble(ptx, arch)
    parts = re.split(r"Compiling entry function '([^']+)'", report)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        figures = {key: re.search(pattern, text) for key, pattern in _FIGURES.items()}
        found[name] = KernelResources(**{key: int(m.group(1)) if m else 0 for key, m in figures.items()})
    return found
