"""One launch: batches of blocks, each on a machine with its memories, and the counts of all.

Source: CUDA C++ Programming Guide, "Kernels" and "Thread Hierarchy".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (  # noqa: F401  (each registers its decoders)
    atomics,
    bit_ops,
    compare_ops,
    convert,
    float_ops,
    integer_ops,
    memory_ops,
    misc_ops,
    tensor_ops,
    warp_ops,
    wmma_ops,
)
from .async_copy import AsyncCopies
from .classes import classify, flops_of, tensor_name
from .counters import Counters, Traffic
from .machine import CONST_START, Machine
from .memory import Memory
from .program import Program
from .races import BlockRaces
from .scheduler import Scheduler
from .shared import SharedSpace
from .spaces import ConstSpace, GenericSpace, GlobalSpace, LocalSpace
from .syntax import Variable

_LANES = 8192  # of a batch: enough to hide Python's own time
_SHARED_BYTES = 4 << 20  # of a batch
_REGISTER_BYTES = 128 << 20  # of a batch

Shape = tuple[int, int, int]


@dataclass
class Launch:
    """What a launch runs: a linked program, its shape, parameters and memory, and where it counts."""

    program: Program
    grid: Shape
    block: Shape
    parameters: list[tuple[Variable, bytes]]
    constants: bytes  # the .const variables
    symbols: dict[str, int]  # addresses of the .const and .global variables
    memory: Memory
    counters: Counters
    collect_faults: bool
    max_turns: int

    def run(self) -> None:
        """Run all blocks and complete the counters."""
        counters = self.counters
        self.memory.start_launch()
        size, granule = self.memory.data.size, self.program.smallest_global_access()
        races = BlockRaces(size, granule, counters.blocks) if counters.blocks > 1 else None
        batch, done, scheduler = self.batch_size(), 0, None
        with np.errstate(all="ignore"):
            while done < counters.blocks:
                count = min(batch, counters.blocks - done)
                if scheduler is None or scheduler.machine.blocks != count:
                    if scheduler is not None:
                        self.account(scheduler)
                    scheduler = Scheduler(self.machine(count, races), self.program, self.max_turns)
                scheduler.machine.start(done)
                scheduler.run()
                done += count
        if scheduler is not None:
            self.account(scheduler)
        for line in counters.lines.values():
            t = line.traffic
            counters.traffic.setdefault(line.kind, Traffic()).add(t.requests, t.bytes, t.units, t.ideal)
        counters.bytes_read, counters.bytes_written = self.memory.touched()

    def batch_size(self) -> int:
        """How many blocks run side by side."""
        lanes = -(-self.counters.threads // 32) * 32
        register_bytes = 4 * len(self.program.kernel.registers) * lanes
        most = min(
            self.counters.blocks,
            _LANES // lanes,
            _SHARED_BYTES // max(self.program.shared_bytes, 1),
            _REGISTER_BYTES // max(register_bytes, 1),
        )
        return max(most, 1)

    def machine(self, blocks: int, races: BlockRaces | None) -> Machine:
        """A machine for some blocks, with its state spaces and the addresses of all variables."""
        program = self.program
        faults = self.counters.faults if self.collect_faults else None
        machine = Machine(program.kernel, blocks, self.grid, self.block, self.memory, self.counters, faults)
        constants = bytearray(self.constants)
        machine.symbols.update({**self.symbols, **program.shared, **program.local})
        for variable, raw in self.parameters:
            constants += bytes(-len(constants) % max(variable.align, 8))
            machine.symbols[variable.name] = CONST_START + len(constants)
            machine.parameters.add(variable.name)
            constants += raw
        shared = SharedSpace(
            machine,
            program.shared_bytes,
            program.smallest_shared_access(),
            program.has_shared_atomics(),
            program.has_fences(),
        )
        machine.spaces = {
            "global": GlobalSpace(machine, self.memory, races),
            "shared": shared,
            "local": LocalSpace(machine, program.local_bytes),
            "const": ConstSpace(machine, bytes(constants)),
        }
        machine.spaces["generic"] = GenericSpace(machine, dict(machine.spaces))
        machine.copies = AsyncCopies(machine, shared)
        machine.special["dynamic_smem_size"] = machine.constant(program.dynamic_shared, "u32")
        machine.special["total_smem_size"] = machine.constant(program.shared_bytes, "u32")
        return machine

    def account(self, scheduler: Scheduler) -> None:
        """Add a scheduler's instruction counts."""
        counters = self.counters
        warps, lanes = np.cumsum(scheduler.warps_issued), np.cumsum(scheduler.lanes_issued)
        for pc, step in enumerate(self.program.steps):
            issued, executed = int(warps[pc]), int(lanes[pc] - scheduler.lanes_skipped[pc])
            if not issued:
                continue
            kind = classify(step.ins)
            counters.warp_instructions[kind] += issued
            counters.thread_instructions[kind] += executed
            counters.opcodes[".".join((step.ins.opcode, *step.ins.modifiers))] += issued
            unit, flops = flops_of(step.ins)
            if unit == "tensor":
                name = tensor_name(step.ins)
                before = counters.tensor.get(name, (0, 0))
                counters.tensor[name] = (before[0] + issued, before[1] + issued * flops)
                counters.flops["tensor"] += issued * flops
            elif unit:
                counters.flops[unit] += executed * flops


def dimensions(name: str, value: int | Sequence[int]) -> Shape:
    """A grid or block as (x, y, z)."""
    given = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    if not 1 <= len(given) <= 3 or any(int(v) < 1 for v in given):
        raise ValueError(f"{name}={value!r}: pass one to three positive sizes")
    x, y, z = (*(int(v) for v in given), 1, 1)[:3]
    return x, y, z


def pack(parameters: list[Variable], args: Sequence[Any]) -> list[tuple[Variable, bytes]]:
    """The bytes of each kernel parameter."""
    if len(parameters) != len(args):
        names = [p.name for p in parameters]
        raise ValueError(f"args has {len(args)} values, and the kernel takes {names}; pass one for each")
    return [(p, _pack_one(p, k, a)) for k, (p, a) in enumerate(zip(parameters, args, strict=True))]


def _pack_one(parameter: Variable, index: int, value: Any) -> bytes:
    size = parameter.size
    if isinstance(value, (bool, int, np.integer)) and parameter.kind not in ("f32", "f64", "f16") and size <= 8:
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if isinstance(value, (bool, int, float)) and size in (2, 4, 8):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
    try:
        raw = bytes(value) if isinstance(value, (bytes, bytearray)) else memoryview(value).cast("B").tobytes()
    except TypeError:
        raise ValueError(
            f"args[{index}]={value!r}: parameter {parameter.name} takes {size} bytes; pass an int, a float, bytes, a "
            f"NumPy value or a ctypes structure (a tensor goes to memory.upload first)"
        ) from None
    if len(raw) != size:
        raise ValueError(f"args[{index}] has {len(raw)} bytes, and parameter {parameter.name} takes {size}; pass that many")
    return raw
