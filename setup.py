"""Builds the compiled kernels into resnet_fused/lib; pyproject.toml holds the rest.

A kernel library is a plain shared object that torch.ops.load_library loads, not a Python extension module, and uses only
PyTorch's stable ABI: one build serves every Python and every PyTorch from 2.10 on. Where PyTorch or a compiler is missing, the
Python package is installed without it, and one line says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10
# Of C++ sources; no function that .cu files call has a version newer than glibc 2.28.
OLD_GLIBC = ["-include", str(ROOT / "csrc" / "glibc_2_28.h")]


def sources(folder: str, pattern: str) -> list[str]:
    """Files under csrc/`folder`, relative to the project, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


def compiler_missing() -> str | None:
    """Why no C++ can be compiled here; None if it can."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return "PyTorch is not installed in the build's environment"
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    return None


def cpu_extension() -> Extension:
    """resnet_fused/lib/resnet_fused_cpu.so: kernels for x86-64 CPUs, chosen at run time by instruction set."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "resnet_fused.lib.resnet_fused_cpu",
        sources("cpu", "*.cpp"),
        depends=[*sources("cpu", "**/*.h"), *sources(".", "*.h")],
        # PyTorch's headers have unused parameters; GCC 12's own _mm512_undefined_ps counts as maybe uninitialised, a warning
        # that Clang doesn't know.
        extra_compile_args=[
            "-O3",
            "-fvisibility=hidden",
            "-g0",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-Wno-unknown-warning-option",
            "-Wno-maybe-uninitialized",
            STABLE_ABI,
            *OLD_GLIBC,
        ],
        py_limited_api=True,
    )


CUDA_LIBRARY = "resnet_fused.lib.resnet_fused_cuda"


def cuda_toolkit() -> Path | None:
    """Root of a CUDA toolkit: CUDA_HOME, else the PyPI package's, else that of the nvcc on PATH or in /usr/local."""
    package, on_path = importlib.util.find_spec("nvidia"), shutil.which("nvcc")
    roots = [root for place in (package and package.submodule_search_locations) or () for root in Path(place).glob("cu*")]
    roots += [Path(on_path).resolve().parent.parent] if on_path else []
    roots.append(Path("/usr/local/cuda"))
    if os.environ.get("CUDA_HOME"):
        roots = [Path(os.environ["CUDA_HOME"])]
    # An nvcc on PATH may be a script that calls one elsewhere.
    whole = ("bin/nvcc", "include/cuda_runtime.h")
    return next((root for root in roots if all((root / part).is_file() for part in whole)), None)


# Machine code is made for these GPUs where none is visible, and PTX for later ones. docs/cuda-kernels.md has the build's time.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def nvcc_says(*arguments: str) -> str:
    assert toolkit is not None
    return subprocess.run([toolkit / "bin" / "nvcc", *arguments], capture_output=True, text=True).stdout


def say(text: str) -> None:
    print(f"resnet_fused: {text}", file=sys.stderr)


def cuda_remedy() -> str:
    import torch

    # The extra nvcc alone leaves the versions of its parts free, and parts of two releases don't work together.
    package = f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda}.*"
    return f'pip install "{package}" and build again with --no-build-isolation'


def cuda_missing() -> str | None:
    """Why the CUDA kernels can't be built here, with the remedy; None if they can."""
    import torch

    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    major, minor = torch.version.cuda.split(".")[:2]
    remedy = cuda_remedy()
    if toolkit is None:
        home = os.environ.get("CUDA_HOME")
        return f"there is no nvcc in CUDA_HOME={home}; correct or unset it" if home else f"there is no nvcc; {remedy}"
    release = re.search(r"release (\d+)\.(\d+)", nvcc_says("--version"))
    if release is None or release.group(1) != major:
        return f"the nvcc in {toolkit} is not of CUDA {major}, which PyTorch was built with; {remedy}, or set CUDA_HOME"
    if int(release.group(2)) > int(minor):
        newer = f"{major}.{release.group(2)}"
        say(f"nvcc is of CUDA {newer}, PyTorch of {torch.version.cuda}: PTX of it needs a driver of CUDA {newer} or newer.")
    if not torch.cuda.is_available():
        known = nvcc_says("--list-gpu-code").split()
        served = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known] or ["8.0"]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{' '.join(served)}+PTX")
    return None


def cuda_fault(folder: Path) -> str | None:
    """Why this nvcc compiles nothing, such as parts of two releases, found on an empty kernel; None if it does."""
    assert toolkit is not None
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe.cu"
    probe.write_text("__global__ void probe() {}\n")
    command = [toolkit / "bin" / "nvcc", "-c", probe, "-o", folder / "probe.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    # The compiler's own line, not what led to it.
    said = next((line for line in lines if re.search("fatal|error|unsupported", line, re.IGNORECASE)), "")
    said = said or next(iter(lines), f"exit status {done.returncode}")
    return f"the nvcc in {toolkit} can't compile an empty kernel ({said}); {cuda_remedy()}"


def cuda_extension() -> Extension:
    """resnet_fused/lib/resnet_fused_cuda.so: for TORCH_CUDA_ARCH_LIST, else the GPUs visible, else ARCHITECTURES."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    assert toolkit is not None
    major = torch.version.cuda.split(".")[0]
    return CppExtension(
        CUDA_LIBRARY,
        sources("cuda", "*.cpp") + sources("cuda", "*.cu"),
        depends=sources("cuda", "*.h") + sources("cuda", "*.cuh") + sources(".", "*.h"),
        include_dirs=[str(toolkit / "include")],
        library_dirs=[str(toolkit / folder) for folder in ("lib64", "lib") if (toolkit / folder).is_dir()],
        libraries=["torch_cuda"],
        extra_compile_args={
            "cxx": ["-O2", "-fvisibility=hidden", "-g0", "-DUSE_CUDA", STABLE_ABI, *OLD_GLIBC],
            "nvcc": ["-Xcompiler", "-fvisibility=hidden", STABLE_ABI],
        },
        # PyTorch's own runtime, by its full name: the PyPI toolkit has no libcudart.so.
        extra_link_args=[f"-l:libcudart.so.{major}"],
        optional=True,
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """Every library that can be built here."""
    without_cuda = cuda_missing()
    if without_cuda is not None:
        say(f"the CUDA kernels are not built, since {without_cuda}.")
        return [cpu_extension()]
    return [cpu_extension(), cuda_extension()]


def build_command() -> type[Any]:
    """PyTorch's build_ext, with the libraries named after what they are: no Python tag in the file's name."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def run(self) -> None:
            (ROOT / "resnet_fused" / "lib").mkdir(exist_ok=True)  # where an editable install puts them
            super().run()

        def build_extension(self, ext: Extension) -> None:
            if ext.name != CUDA_LIBRARY:
                super().build_extension(ext)
                return
            fault = cuda_fault(Path(self.build_temp))
            if fault is not None:
                say(f"the CUDA kernels are not built, since {fault}.")
                return
            try:
                super().build_extension(ext)
            except Exception as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                say(f"the CUDA kernels are not built, since compiling them failed: {reason}; see the compiler's output above.")

        def get_ext_filename(self, name: str) -> str:
            return str(Path(*name.split(".")).with_suffix(".so"))

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []  # there is no PyInit function

    return BuildLibraries


class Wheel(bdist_wheel):
    """A wheel for any Python, since the libraries in it are no extension modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


toolkit = cuda_toolkit()
if toolkit is not None:
    os.environ["CUDA_HOME"] = str(toolkit)  # torch.utils.cpp_extension reads it when it is imported
reason = compiler_missing()
if reason is None:
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command(), "bdist_wheel": Wheel})
else:
    say(f"the compiled kernels are not built, since {reason}; the Python package works without.")
    setup()
