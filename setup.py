"""Builds the compiled kernels into resnet_fused/lib; pyproject.toml holds the rest.

A kernel library is a plain shared object that torch.ops.load_library loads, not a Python extension module, and uses only
PyTorch's stable ABI: one build serves every Python and every PyTorch from 2.10 on. Where PyTorch or a compiler is missing, the
Python package is installed without it, and one line says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10


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
        depends=sources("cpu", "*.h"),
        # PyTorch's headers have unused parameters; GCC 12's own _mm512_undefined_ps counts as maybe uninitialised.
        extra_compile_args=["-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter",
                            "-Wno-maybe-uninitialized", STABLE_ABI],
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """Every library that can be built here."""
    return [cpu_extension()]


def build_command() -> type[Any]:
    """PyTorch's build_ext, with the libraries named after what they are: no Python tag in the file's name."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def run(self) -> None:
            (ROOT / "resnet_fused" / "lib").mkdir(exist_ok=True)  # where an editable install puts them
            super().run()

        def get_ext_filename(self, name: str) -> str:
            return str(Path(*name.split(".")).with_suffix(".so"))

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []  # there is no PyInit function

    return BuildLibraries


reason = compiler_missing()
if reason is None:
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
else:
    print(f"resnet_fused: the compiled kernels are not built, since {reason}; the Python package works without.", file=sys.stderr)
    setup()
