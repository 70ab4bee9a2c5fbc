"""A PTX module and its launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .counters import Counters
from .launch import Launch, dimensions, pack
from .machine import CONST_START, CONST_WINDOW
from .memory import Memory
from .parser import parse
from .program import layout_constants, link
from .syntax import Function

SHARED_LIMIT = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10}  # bytes for a block
_keys = itertools.count()


class Module:
    """A PTX module.

    ``kernels`` has the kernels by name; a kernel may also be named by any part of its name that no other kernel has.

    Raises:
        PtxSyntaxError: the text cannot be parsed.
    """

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.parsed = parse(ptx)
        self.kernels: dict[str, Function] = {n: f for n, f in self.parsed.functions.items() if f.is_kernel}
        self._key = next(_keys)
        self._constant_addresses, self._constants = layout_constants(self.parsed)

    def find(self, name: str) -> Function:
        """A kernel by name or by a part of it."""
        if name in self.kernels:
            return self.kernels[name]
        found = [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise ValueError(f"kernel={name!r} matches {len(found)} kernels; name one of {sorted(self.kernels)}")
        return self.kernels[found[0]]

    def write_symbol(self, name: str, array: Any, memory: Memory | None = None) -> None:
        """Set a __constant__ variable, or (with ``memory``) a __device__ variable."""
        raw = np.ascontiguousarray(array).tobytes()
        variable = self.parsed.variables.get(name)
        if variable is None:
            raise ValueError(f"name={name!r}: no such variable; this module has {sorted(self.parsed.variables)}")
        if len(raw) > variable.size:
            raise ValueError(f"array has {len(raw)} bytes, and {name} holds {variable.size}; pass at most that")
        if variable.space == "const":
            at = self._constant_addresses[name] - CONST_START
            self._constants[at : at + len(raw)] = raw
        elif memory is None:
            raise ValueError(f"memory=None: {name} is a __device__ variable; pass the Memory it lives in")
        else:
            memory.write(self.symbol_address(name, memory), np.frombuffer(raw, np.uint8))

    def symbol_address(self, name: str, memory: Memory) -> int:
        """The address of a __device__ variable in a memory."""
        return self._globals(memory)[name]

    def _globals(self, memory: Memory) -> dict[str, int]:
        """The addresses of the __device__ variables; a memory gets them at its first use with this module."""
        if self._key in memory.symbols:
            return memory.symbols[self._key]
        table = memory.symbols.setdefault(self._key, {})
        variables = [v for v in self.parsed.variables.values() if v.space == "global"]
        for variable in variables:
            table[variable.name] = memory.zeros(variable.size)
        for variable in variables:
            if variable.initial is not None:
                content = bytearray(variable.initial)
                for at, symbol in variable.references:
                    address = table.get(symbol.name) or self._constant_addresses.get(symbol.name, 0) + CONST_WINDOW
                    content[at : at + 8] = (address + symbol.offset).to_bytes(8, "little")
                memory.write(table[variable.name], np.frombuffer(bytes(content), np.uint8))
        return table

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        memory: Memory | None = None,
        *,
        collect_faults: bool = False,
        max_turns: int = 2_000_000,
    ) -> Counters:
        """Run a kernel, and count and check what it does.

        Args:
            kernel: its name, or a part of it that is unique.
            grid, block: blocks and threads in x, y, z.
            args: the parameters in order: int (addresses too), float, bool; bytes, NumPy scalars or arrays, or ctypes
                structures for parameters passed by value.
            shared_bytes: of dynamic shared memory for each block.
            memory: where the addresses among ``args`` lie.
            collect_faults: note races and reads of undefined or undelivered data in Counters.faults and go on, with the
                value poisoned (all ones: NaN), instead of raising the first. Other faults always raise.
            max_turns: of the scheduler for one batch of blocks, after which the launch is taken for an endless loop.

        Raises:
            KernelFault: the kernel did what it must not do.
            UnsupportedInstruction: the kernel has an instruction that the executor does not know.
            ValueError: an argument does not fit.
        """
        function = self.find(kernel)
        memory = Memory() if memory is None else memory
        grid3, block3 = dimensions("grid", grid), dimensions("block", block)
        threads = block3[0] * block3[1] * block3[2]
        self._check_block(function, block3, threads)
        program = link(self.parsed, function, shared_bytes)
        allowed = SHARED_LIMIT.get(self.parsed.target.rstrip("a"), 227 << 10)
        if program.shared_bytes > allowed:
            raise ValueError(
                f"shared_bytes={shared_bytes}: with its static variables the block needs {program.shared_bytes} bytes, "
                f"and {self.parsed.target} has {allowed}; use a smaller tile or fewer stages"
            )
        counters = Counters(function.name, grid3[0] * grid3[1] * grid3[2], threads, program.shared_bytes)
        Launch(
            program,
            grid3,
            block3,
            pack(function.parameters, args),
            bytes(self._constants),
            {**self._globals(memory), **self._constant_addresses},
            memory,
            counters,
            collect_faults,
            max_turns,
        ).run()
        return counters

    def _check_block(self, function: Function, block: tuple[int, int, int], threads: int) -> None:
        required, most = function.directives.get("reqntid"), function.directives.get("maxntid", [1024])
        if required and threads != int(np.prod(required)):
            raise ValueError(f"block={block}: {function.name} was compiled for blocks of {required}; launch it with that")
        if threads > int(np.prod(most)):
            raise ValueError(f"block={block}: {function.name} was compiled for at most {most} threads; launch it with fewer")
