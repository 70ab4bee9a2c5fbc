"""The CPU library on another architecture: compiled and linked for aarch64, where it has the scalar kernels alone."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
INCLUDES = [f"-I{folder}" for folder in cpp_extension.include_paths()]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# What a shared library finds where it is loaded: PyTorch's C functions, and the C and C++ libraries.
OUTSIDE = re.compile(
    r"(aoti_)?torch_|_ZN?K?S[ts]|_ZS|_ZT[ITVS]|_Zn|_Zd|_ZNK?St|__cxa|__gxx|_Unwind|__[a-z_]+$|[a-z0-9_]+(@.*)?$"
)
needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="there is no compiler for aarch64; pip install ziglang"
)
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm; apt-get install binutils")


def compile_all(target: str, folder: Path) -> list[Path]:
    def one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w", STABLE_ABI, *INCLUDES]
        command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return made

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(one, SOURCES)]


@needs_zig
@needs_nm
def test_everything_links_for_aarch64(tmp_path: Path) -> None:
    objects = compile_all("aarch64-linux-gnu", tmp_path)
    library = tmp_path / "resnet_fused_cpu.so"
    # Without the C++ library, which zig would build first, and for longer than all else takes.
    link = ["-target", "aarch64-linux-gnu", "-shared", "-nostdlib", "-Wl,--allow-shlib-undefined", "-Wl,-z,undefs"]
    command = [sys.executable, "-m", "ziglang", "c++", *link, *map(str, objects), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    missing = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any("torch" in name for name in missing), listed.stdout
    assert not [name for name in missing if "resnet_fused" in name or not OUTSIDE.match(name)]


# What kernel headers find: the system's headers, and an instruction set's vectors.
KERNEL_CONTEXT = (ROOT / "csrc" / "cpu" / "scalar.cpp").read_text().partition('#include "isa_kernels.h"')[0]


@pytest.mark.parametrize("folder", ["cpu", "cuda", "."])
def test_headers_stand_alone(folder: str, tmp_path: Path) -> None:
    """Each header compiles by itself; one of kernels in the context that an instruction set's source file gives it."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler!r}; apt-get install g++")
    toolkit = [f"-I{path}" for path in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/include")]
    headers = sorted((ROOT / "csrc" / folder).glob("*.h"))
    assert headers

    def fault(header: Path) -> str:
        text = header.read_text()
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f'{KERNEL_CONTEXT if "RF_ISA {" in text else ""}#include "{header}"\n')
        command = [compiler, "-std=c++20", "-fsyntax-only", "-w", STABLE_ABI, f"-I{ROOT / 'csrc' / 'cpu'}", *INCLUDES, *toolkit]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        return "" if done.returncode == 0 else f"{header.name} doesn't stand alone:\n{done.stderr[:2000]}"

    with ThreadPoolExecutor(2) as pool:
        faults = [*filter(None, pool.map(fault, headers))]
    assert not faults, "\n".join(faults)
