"""Runs PTX on the CPU: executes what a kernel does, counts it, and checks what it must not do."""

from __future__ import annotations

from .counters import Counters, Line, Traffic
from .errors import KernelFault, PtxError, PtxSyntaxError, UnsupportedInstruction
from .memory import Memory
from .module import Module
from .sass import SassMix, sass_mix
from .toolchain import (
    CompileError,
    KernelResources,
    Toolkit,
    ToolkitNotFound,
    compile_cubin,
    compile_ptx,
    find_toolkit,
    ptxas_info,
)
from .triton_launch import Output, compile_triton, launch_triton

__all__ = [
    "CompileError",
    "Counters",
    "KernelFault",
    "KernelResources",
    "Line",
    "Memory",
    "Module",
    "Output",
    "PtxError",
    "PtxSyntaxError",
    "SassMix",
    "Toolkit",
    "ToolkitNotFound",
    "Traffic",
    "UnsupportedInstruction",
    "compile_cubin",
    "compile_ptx",
    "compile_triton",
    "find_toolkit",
    "launch_triton",
    "ptxas_info",
    "sass_mix",
]
