"""Modules and launches.

Source: PTX ISA; launch semantics after the CUDA C++ Programming Guide, "Kernels".
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import atomics, bit_ops, convert, float_ops, integer_ops, memory_ops, misc_ops, tensor_ops, warp_ops, wmma_ops  # noqa: F401  (decoders)
from .async_copy import AsyncCopies
from .classes import classify, flops_of, type_of
from .counters import Counters, Traffic
from .errors import KernelFault
from .machine import CONST_START, CONST_WINDOW, Machine
from .memory import Memory
from .parser import Function, Variable, parse
from .program import Program, layout_constants, link
from .scheduler import Scheduler
from .spaces import ConstSpace, GenericSpace, GlobalSpace, LocalSpace, SharedSpace

SHARED_LIMIT = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10}  # bytes for a block
_LANES = 8192  # of a batch: enough to hide Python's own time
_SHARED_BYTES = 4 << 20  # of a batch
_REGISTER_BYTES = 128 << 20
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
            raise ValueError(f"kernel={name!r}: {len(found)} kernels match; this module has {sorted(self.kernels)}")
        return self.kernels[found[0]]

    def write_symbol(self, name: str, array: Any, memory: Memory | None = None) -> None:
        """Set a __constant__ variable, or (with ``memory``) a __device__ variable."""
        raw = np.ascontiguousarray(array).tobytes()
        variable = self.parsed.variables.get(name)
        if variable is None or len(raw) > variable.size:
            raise ValueError(f"name={name!r}: {'no such variable' if variable is None else f'{len(raw)} bytes do not fit its {variable.size}'}; "
                             f"this module has {sorted(self.parsed.variables)}")  # fmt: skip
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
        max_turns: int = 5_000_000,
    ) -> Counters:
        """Run a kernel, and count and check what it does.

        Args:
            kernel: its name, or a part of it that is unique.
            grid, block: blocks and threads in x, y, z.
            args: the parameters in order: int (addresses too), float, bool; bytes, NumPy scalars or arrays, or ctypes structures
                for parameters passed by value.
            shared_bytes: of dynamic shared memory for each block.
            memory: where the addresses among ``args`` lie.
            collect_faults: note races and reads of undefined or undelivered data in Counters.faults and go on, with the value
                poisoned (all ones: NaN), instead of raising the first. Out-of-bounds accesses, misalignment and deadlock always raise.
            max_turns: of the scheduler, after which the launch is taken for an endless loop.

        Raises:
            KernelFault: the kernel did what it must not do.
            UnsupportedInstruction: the kernel has an instruction that the executor does not know.
            ValueError: an argument does not fit.
        """
        function = self.find(kernel)
        memory = Memory() if memory is None else memory
        grid3, block3 = _dimensions("grid", grid), _dimensions("block", block)
        threads = block3[0] * block3[1] * block3[2]
        limit = function.directives.get("reqntid") or function.directives.get("maxntid")
        bound = int(np.prod(limit)) if limit else 1024
        if threads > bound or ("reqntid" in function.directives and threads != bound):
            raise ValueError(
                f"block={block3}: {threads} threads, and the kernel was compiled for {bound}; launch it with that"
            )
        program = link(self.parsed, function, shared_bytes)
        allowed = SHARED_LIMIT.get(self.parsed.target.rstrip("a"), 227 << 10)
        if program.shared_bytes > allowed:
            raise ValueError(f"shared_bytes={shared_bytes}: the block needs {program.shared_bytes} bytes of shared memory with its static "
                             f"variables, and {self.parsed.target} has {allowed}; use a smaller tile or fewer stages")  # fmt: skip
        counters = Counters(function.name, grid3[0] * grid3[1] * grid3[2], threads, program.shared_bytes)
        faults: list[KernelFault] | None = counters.faults if collect_faults else None
        parameters = _pack(function.parameters, args)
        symbols = self._globals(memory)
        memory.start_launch()
        batch = _batch_size(function, counters.blocks, threads, program.shared_bytes)
        with np.errstate(all="ignore"):
            done, scheduler = 0, None
            while done < counters.blocks:
                count = min(batch, counters.blocks - done)
                if scheduler is None or scheduler.machine.blocks != count:
                    if scheduler is not None:
                        _account(counters, program, scheduler)
                    machine = Machine(function, count, grid3, block3, memory, counters, faults)
                    self._furnish(machine, program, parameters, symbols)
                    scheduler = Scheduler(machine, program, max_turns)
                scheduler.machine.start(done)
                for space in scheduler.machine.spaces.values():
                    if isinstance(space, SharedSpace):
                        space.reset()
                scheduler.machine.copies.reset()
                scheduler.run()
                done += count
            if scheduler is not None:
                _account(counters, program, scheduler)
        for line in counters.lines.values():
            t = line.traffic
            counters.traffic.setdefault(line.kind, Traffic()).add(t.requests, t.bytes, t.units, t.ideal)
        counters.bytes_read, counters.bytes_written = memory.touched()
        return counters

    def _furnish(
        self, machine: Machine, program: Program, parameters: list[tuple[Variable, bytes]], symbols: dict[str, int]
    ) -> None:
        """Give a machine its state spaces and the addresses of all variables."""
        constants = bytearray(self._constants)
        for variable, raw in parameters:
            constants += bytes(-len(constants) % max(variable.align, 8))
            machine.parameters[variable.name] = (raw, len(constants))
            machine.symbols[variable.name] = CONST_START + len(constants)
            constants += raw
        machine.symbols.update({**symbols, **self._constant_addresses, **program.shared, **program.local})
        shared = SharedSpace(
            machine, program.shared_bytes, program.smallest_shared_access(), program.has_shared_atomics()
        )
        machine.spaces.update(
            {"global": GlobalSpace(machine, machine.memory), "shared": shared, "local": LocalSpace(machine, program.local_bytes),
             "const": ConstSpace(machine, bytes(constants))}
        )  # fmt: skip
        machine.spaces["generic"] = GenericSpace(machine, dict(machine.spaces))
        machine.copies = AsyncCopies(machine, shared)
        machine.special["dynamic_smem_size"] = machine.constant(program.shared_bytes, "u32")


def _dimensions(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    if not 1 <= len(given) <= 3 or any(int(v) < 1 for v in given):
        raise ValueError(f"{name}={value!r}: one to three positive sizes are needed")
    x, y, z = (*(int(v) for v in given), 1, 1)[:3]
    return x, y, z


def _batch_size(function: Function, blocks: int, threads: int, shared_bytes: int) -> int:
    lanes = -(-threads // 32) * 32
    by_registers = _REGISTER_BYTES // max(1, 4 * len(function.registers) * lanes)
    return max(1, min(blocks, _LANES // lanes, _SHARED_BYTES // max(shared_bytes, 1), by_registers))


def _pack(parameters: list[Variable], args: Sequence[Any]) -> list[tuple[Variable, bytes]]:
    if len(parameters) != len(args):
        raise ValueError(
            f"args has {len(args)} values, and the kernel takes {len(parameters)}: {[p.name for p in parameters]}"
        )
    return [(p, _pack_one(p, k, a)) for k, (p, a) in enumerate(zip(parameters, args))]


def _pack_one(parameter: Variable, index: int, value: Any) -> bytes:
    size = parameter.size
    if isinstance(value, (bool, int, np.integer)) and parameter.kind not in ("f32", "f64", "f16") and size <= 8:
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if isinstance(value, (bool, int, float)) and size in (2, 4, 8):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
    try:
        raw = bytes(value) if isinstance(value, (bytes, bytearray)) else memoryview(value).cast("B").tobytes()
    except TypeError:
        raise ValueError(f"args[{index}]={value!r}: parameter {parameter.name} takes {size} bytes; pass an int, a float, bytes, a NumPy "
                         f"value or a ctypes structure (a tensor goes to memory.upload first)") from None  # fmt: skip
    if len(raw) != size:
        raise ValueError(
            f"args[{index}] has {len(raw)} bytes, and parameter {parameter.name} takes {size}; pass a value of that size"
        )
    return raw


def _account(counters: Counters, program: Program, scheduler: Scheduler) -> None:
    """Add a scheduler's instruction counts."""
    warps, lanes = np.cumsum(scheduler.warps_issued), np.cumsum(scheduler.lanes_issued)
    for pc, step in enumerate(program.steps):
        issued, executed = int(warps[pc]), int(lanes[pc] - scheduler.lanes_skipped[pc])
        if not issued:
            continue
        kind = classify(step.ins)
        counters.warp_instructions[kind] += issued
        counters.thread_instructions[kind] += executed
        counters.opcodes[".".join((step.ins.opcode, *step.ins.modifiers))] += issued
        unit, flops = flops_of(step.ins)
        if unit == "tensor":
            modifiers = step.ins.modifiers
            name = ".".join(
                [m for m in modifiers if m[0] == "m" and m[1:2].isdigit()]
                + [m for m in modifiers if m == type_of(step.ins) or m in _TYPES]
            )
            before = counters.tensor.get(name, (0, 0))
            counters.tensor[name] = (before[0] + issued, before[1] + issued * flops)
            counters.flops["tensor"] += issued * flops
        elif unit:
            counters.flops[unit] += executed * flops


_TYPES = {"f16", "bf16", "tf32", "f32", "f64", "s8", "u8", "s4", "u4", "s32"}
