"""Kernels that Triton compiled: compile ahead of time for a GPU that is not there, and launch on tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .counters import Counters
from .memory import Memory
from .module import Module

_module = functools.lru_cache(maxsize=64)(Module)  # a kernel is often launched on many problems


class Output:
    """Marks a tensor or array that the kernel must fill: it starts undefined, and every element has to be written."""

    def __init__(self, array: Any) -> None:
        self.array = array


def compile_triton(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int = 80,
    divisible_by_16: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Compile a @triton.jit function ahead of time.

    Args:
        kernel: the function.
        signature: the type of each run-time argument, such as {"x_ptr": "*fp16", "n": "i32"}.
        constants: the value of each tl.constexpr argument.
        arch: compute capability, such as 80.
        divisible_by_16: arguments that Triton may take for multiples of 16, as it finds out by itself in a real launch.
        options: num_warps, num_stages and other options of Triton.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def launch_triton(
    compiled: Any,
    grid: int | Sequence[int],
    args: Sequence[Any] | Mapping[str, Any],
    memory: Memory | None = None,
    **options: Any,
) -> Counters:
    """Launch a kernel that triton.compile returned.

    Args:
        compiled: what triton.compile or ``compile_triton`` returned.
        grid: programs in x, y, z.
        args: the run-time arguments (those that are not constexpr) in order, or by name. Tensors and arrays are
        uploaded in
            their own layout, and copied back after the launch; one wrapped in Output is not uploaded, and the kernel
            must write all of it. Integers are scalars, or addresses in ``memory``.
        memory: where addresses among ``args`` lie.
        options: of Module.launch.

    Raises:
        KernelFault, UnsupportedInstruction: see Module.launch.
        ValueError: a wrong number of arguments, or an Output that was not written in full.
    """
    module, memory = _module(compiled.asm["ptx"]), Memory() if memory is None else memory
    (function,) = module.kernels.values()
    if isinstance(args, Mapping):
        names = [n for n, kind in compiled.src.signature.items() if str(kind) != "constexpr"]
        if set(names) != set(args):
            raise ValueError(f"args has {sorted(args)}, and the kernel takes {names}; name each of these once")
        args = [args[n] for n in names]
    values: list[Any] = []
    arrays: dict[tuple[int, int], tuple[int, Any]] = {}  # a tensor given twice lies in memory once
    for value in args:
        array = value.array if isinstance(value, Output) else value
        if not isinstance(array, np.ndarray) and not hasattr(array, "data_ptr"):
            values.append(value)
            continue
        key = (array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data, array.nbytes)
        if key not in arrays:
            address = memory.empty_like(array) if isinstance(value, Output) else memory.upload(array)
            arrays[key] = (address, array)
        values.append(arrays[key][0])
    metadata = compiled.metadata
    shape = (grid,) if isinstance(grid, int) else tuple(grid)
    programs = int(np.prod(shape))
    scratch = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    missing = len(function.parameters) - len(values)
    if not 0 <= missing <= len(scratch):
        wanted = len(function.parameters) - len(scratch)
        raise ValueError(f"args has {len(values)} values, and the kernel takes {wanted} and two scratch pointers")
    values += [memory.empty(size * programs) if size else 0 for size in scratch[:missing]]
    threads = function.directives.get("reqntid", [32 * metadata.num_warps])
    counters = module.launch(function.name, shape, int(np.prod(threads)), values, metadata.shared, memory, **options)
    for address, array in arrays.values():
        memory.download_into(address, array)
    return counters
