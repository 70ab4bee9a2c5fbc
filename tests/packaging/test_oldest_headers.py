"""Every C++ source compiles with the headers of the oldest PyTorch that pyproject.toml allows.

TORCH_TARGET_VERSION hides newer functions, but not newer macros and classes, so that a build with a newer PyTorch doesn't find
the use of one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ptx_executor import toolchain
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).parents[2]


def oldest() -> str:
    """The oldest PyTorch that pyproject.toml allows, such as 2.10."""
    found = re.search(r'^dependencies = \["torch>=(\d+\.\d+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def target() -> str:
    """The compiler's flag by which setup.py chooses the stable ABI's version."""
    found = re.search(r"-DTORCH_TARGET_VERSION=(0x[0-9a-f]{16})", (ROOT / "setup.py").read_text())
    assert found is not None
    return found.group(0)


def test_the_abi_is_that_of_the_oldest_pytorch() -> None:
    number = int(target().split("=")[1], 16)
    assert f"{number >> 56}.{number >> 48 & 255}" == oldest()
    assert number & (1 << 48) - 1 == 0


SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*/*.cpp"))]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_compiles_with_the_oldest_headers(source: str) -> None:
    headers = ROOT / "build" / f"headers-torch-{oldest()}" / "torch" / "include"
    if not headers.is_dir():
        pytest.skip(f"the headers of PyTorch {oldest()} are missing; make {headers.parents[1].relative_to(ROOT)} gets them")
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler!r}; install one")
    include = [headers]
    if "cuda" in Path(source).parts:
        try:
            include.append(toolchain.find_toolkit().include)
        except toolchain.ToolkitNotFound as missing:
            pytest.skip(str(missing))
    # PyTorch 2.10 compiles extensions as C++17, newer ones as C++20.
    command = [compiler, "-std=c++17", "-fsyntax-only", target(), "-DUSE_CUDA", *(f"-I{folder}" for folder in include), source]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
