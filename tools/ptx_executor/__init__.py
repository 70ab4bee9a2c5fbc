"""Runs PTX on the CPU: executes what a kernel does, counts it, and checks what it must not do."""

from __future__ import annotations

from .counters import Counters, Line, Traffic
from .errors import KernelFault, PtxError, PtxSyntaxError, UnsupportedInstruction
from .launch import Module
from .memory import Memory

__all__ = ["Counters", "KernelFault", "Line", "Memory", "Module", "PtxError", "PtxSyntaxError", "Traffic", "UnsupportedInstruction"]
