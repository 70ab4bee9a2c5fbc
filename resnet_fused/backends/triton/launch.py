"""Binding of a Triton kernel to everything but its tensors, so that a launch costs little.

Triton's own launch path looks up a kernel by the types, values and alignments of all arguments, three quarters of its
time (benchmarks/test_launch.py). A `Launch` compiles when it is bound, through `JITFunction.warmup`, and afterwards only hands
over the arguments.
The compiled kernel relies on tensors that are aligned to 16 bytes; `aligned` sees to that.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import config

_INTERPRETER = threading.Lock()
_ALIGNMENT = 16
_TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Anything:
    """Stands for every aligned tensor of a type when a kernel is compiled. AMD has instructions for small ones only."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 2**63 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, integers and compile-time constants.

    Attributes:
        kernel: a function decorated with triton.jit; its arguments are tensors, then integers, then constants.
        tensors: the type of each tensor in order; None if it isn't there.
        scalars: the integers, in order.
        constants: the compile-time constants, in order.
        grid: number of programs along the three axes.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    tensors: tuple[torch.dtype | None, ...]
    scalars: tuple[int, ...]
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    warps: int = 4
    stages: int = 1

    def bind(self) -> Any:
        """Compiles for the current device. Gives a function of the tensors that launches on the current stream."""
        scalars, constants, grid = self.scalars, self.constants, self.grid
        if config.triton_interpreted():
            return functools.partial(interpret, self.kernel[grid], scalars, constants)
        tensors = [t and _Anything(t) for t in self.tensors]
        compiled = self.kernel.warmup(*tensors, *scalars, **constants, grid=grid, num_warps=self.warps, num_stages=self.stages)
        runner = compiled[grid]
        tail = (*scalars, *constants.values())
        return lambda *tensors: runner(*tensors, *tail)

    def compile(self, target: Any) -> Any:
        """The kernel compiled ahead of time for a `triton.backends.compiler.GPUTarget`; no such device is needed."""
        import triton

        names = self.kernel.arg_names
        signature, constants, attributes = {}, dict(self.constants), {}
        for index, (name, tensor) in enumerate(zip(names, self.tensors, strict=False)):
            if tensor is None:
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = "*" + _TRITON_TYPES[tensor]
                attributes[(index,)] = [["tt.divisibility", _ALIGNMENT]]
        for name in names[len(self.tensors) : len(self.tensors) + len(self.scalars)]:
            signature[name] = "i32"
        signature.update(dict.fromkeys(self.constants, "constexpr"))
        source = triton.compiler.ASTSource(
            self.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
        )
        return triton.compile(source, target=target, options={"num_warps": self.warps, "num_stages": self.stages})


def interpret(launch: Any, scalars: tuple[int, ...], constants: dict[str, Any], *tensors: Tensor | None) -> None:
    # The interpreter replaces functions of triton.language while it runs.
    with _INTERPRETER:
        launch(*tensors, *scalars, **constants)


def on(device: torch.device) -> torch.cuda.device:
    """Makes a CUDA device the current one within a `with` block; does nothing for CPU tensors."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def aligned(x: Tensor) -> Tensor:
    """x itself if it starts at a multiple of 16 bytes, else a copy that does (the allocator's blocks all do)."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
