"""The state of a batch of blocks: one column (lane) for each thread, one array for each register.

Lanes are ordered block, warp, lane in the warp; a block's last warp is padded to 32 lanes. A *selection* names the
lanes that an instruction runs for: None for all of them, else a sorted index array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .counters import Counters
from .errors import KernelFault, UnsupportedInstruction
from .memory import Memory
from .syntax import TYPE_BYTES, Address, Function, Immediate, Instruction, Not, Register, Special, Symbol

Selection = np.ndarray | None
Action = Callable[[Selection], None]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
_STORAGE: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}

# Where the windows of the generic address space lie, and the first valid offset in shared and local memory.
SHARED_WINDOW, LOCAL_WINDOW, CONST_WINDOW = 0x7000 << 32, 0x7100 << 32, 0x7200 << 32
SHARED_START, LOCAL_START, CONST_START = 1024, 16, 16


class Machine:
    """Registers, special registers and memories of ``blocks`` blocks that run side by side."""

    def __init__(
        self,
        kernel: Function,
        blocks: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        memory: Memory,
        counters: Counters,
        collect: list[KernelFault] | None,
    ) -> None:
        self.kernel, self.blocks, self.grid, self.block, self.memory = kernel, blocks, grid, block, memory
        self.counters, self.collected = counters, collect
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // 32)  # of one block
        self.lanes = blocks * self.warps * 32
        lane = np.arange(self.lanes)
        self.block_of = lane // (self.warps * 32)
        tid = lane % (self.warps * 32)
        self.exists = tid < self.threads  # lanes that are threads
        self.alive = self.exists.copy()  # and have not exited
        self.clock = np.zeros(1, np.uint64)  # advances with the scheduler's turns
        self.special = self._special_registers(tid)
        self._registers: dict[tuple[str, str], np.ndarray] = {}
        self.symbols: dict[str, int] = {}  # address of each variable, in its own state space
        self.parameters: set[str] = set()  # names of the kernel's parameters
        self.function = kernel  # whose operands are being decoded
        self.instruction: Instruction | None = None
        self.first_block = 0
        self.spaces: dict[str, Any] = {}  # the state spaces and the copies in flight: see launch.py
        self.copies: Any = None

    def _special_registers(self, tid: np.ndarray) -> dict[str, np.ndarray]:
        """The special registers, without %; ctaid is set by ``start``."""
        registers = {}
        xyz = (tid % self.block[0], tid // self.block[0] % self.block[1], tid // (self.block[0] * self.block[1]))
        for axis, t, nt, n in zip("xyz", xyz, self.block, self.grid, strict=True):
            registers[f"tid.{axis}"] = t.astype(np.uint32)
            registers[f"ntid.{axis}"] = self.constant(nt, "u32")
            registers[f"nctaid.{axis}"] = self.constant(n, "u32")
            registers[f"ctaid.{axis}"] = np.zeros(self.lanes, np.uint32)
        one, bit = np.uint64(1), np.uint64(1) << (tid % 32).astype(np.uint64)
        masks = {"eq": bit, "lt": bit - one, "le": (bit << one) - one, "gt": ~((bit << one) - one), "ge": ~(bit - one)}
        registers |= {f"lanemask_{name}": mask.astype(np.uint32) for name, mask in masks.items()}
        registers |= {"laneid": (tid % 32).astype(np.uint32), "warpid": (tid // 32).astype(np.uint32)}
        fixed = {"nwarpid": self.warps, "smid": 0, "nsmid": 1, "gridid": 0, "WARP_SZ": 32}
        registers |= {name: self.constant(value, "u32") for name, value in fixed.items()}
        time, low = (np.broadcast_to(t, (self.lanes,)) for t in (self.clock, self.clock.view(np.uint32)[:1]))
        return registers | {"clock64": time, "globaltimer": time, "clock": low, "globaltimer_lo": low}

    def start(self, first_block: int) -> None:
        """Begin the batch of blocks that starts at linear block ``first_block``."""
        self.first_block = first_block
        linear = first_block + self.block_of
        self.special["ctaid.x"][:] = linear % self.grid[0]
        self.special["ctaid.y"][:] = linear // self.grid[0] % self.grid[1]
        self.special["ctaid.z"][:] = linear // (self.grid[0] * self.grid[1])
        self.alive[:] = self.exists
        for storage in self._registers.values():  # undefined: NaN, or false
            storage.view(np.uint8)[:] = 0 if storage.dtype == np.bool_ else 0xFF
        self.spaces["shared"].reset()
        self.spaces["local"].reset()
        self.copies.reset()

    # ---- operands --------------------------------------------------------------------------------------------------
    def constant(self, value: int | float, kind: str) -> np.ndarray:
        """A constant of a PTX type, as a read-only array over all lanes."""
        dtype = np.dtype(DTYPES[kind])
        scalar: Any
        if kind == "f16" and not isinstance(value, float):
            scalar = np.uint16(value & 0xFFFF).view(np.float16)
        elif dtype.kind == "f":
            with np.errstate(over="ignore"):
                scalar = dtype.type(value)
        elif dtype.kind == "b":
            scalar = np.bool_(value)
        elif isinstance(value, float):  # 0f... given to a bit-typed instruction
            bits = np.float64(value).view(np.uint64) if dtype.itemsize == 8 else np.float32(value).view(np.uint32)
            scalar = bits.astype(dtype)
        else:
            scalar = np.array(value & ((1 << 8 * dtype.itemsize) - 1), np.uint64).astype(_STORAGE[dtype.itemsize]).view(dtype)
        return np.broadcast_to(scalar, (self.lanes,))

    def storage(self, name: str) -> np.ndarray:
        """The array of a register."""
        key = (self.function.name, name)
        if key not in self._registers:
            if name not in self.function.registers:
                raise self.unsupported(f"undeclared register {name}")
            kind = self.function.registers[name]
            dtype = np.bool_ if kind == "pred" else _STORAGE[TYPE_BYTES[kind]]
            self._registers[key] = np.zeros(self.lanes, dtype)
        return self._registers[key]

    def source(self, operand: object, kind: str) -> np.ndarray:
        """An operand as an array over lanes of the type's dtype; a wider register gives its low part."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            return _narrow(self.storage(operand.name), dtype, self)
        if isinstance(operand, Immediate):
            return self.constant(operand.value, kind)
        if isinstance(operand, Special):
            return _narrow(self.special_register(operand.name), dtype, self)
        if isinstance(operand, Symbol):
            return self.constant(self.address_of(operand), kind)
        raise self.unsupported(f"an operand of the form {operand}")

    def special_register(self, name: str) -> np.ndarray:
        if name not in self.special:
            raise self.unsupported(f"special register %{name}")
        return self.special[name]

    def predicate(self, operand: object) -> tuple[np.ndarray, bool]:
        """A predicate operand and whether it is negated."""
        if isinstance(operand, Not):
            return self.source(operand.register, "pred"), True
        return self.source(operand, "pred"), False

    def destination(self, operand: object, kind: str) -> np.ndarray:
        """The array to write a result of this type to; assigning extends it to a wider register by the type's sign."""
        dtype = np.dtype(DTYPES[kind])
        if operand is None:
            return np.zeros(self.lanes, dtype)
        if not isinstance(operand, Register):
            raise self.unsupported(f"{operand} is not a register")
        storage = self.storage(operand.name)
        if storage.dtype == np.bool_ or dtype.kind == "b":
            if storage.dtype != dtype:
                raise self.unsupported(
                    f"{operand.name} is not a predicate" if dtype.kind == "b" else f"{operand.name} is a predicate"
                )
            return storage
        if storage.dtype.itemsize == dtype.itemsize:
            return storage.view(dtype)
        if storage.dtype.itemsize < dtype.itemsize:
            raise self.unsupported(f"register {operand.name} is narrower than .{kind}")
        if dtype.kind == "f":  # the bits go to the low part, zero-extended
            raise self.unsupported(f"register {operand.name} is wider than .{kind}")
        return storage.view(np.dtype(f"{dtype.kind}{storage.dtype.itemsize}"))

    def address(self, operand: Address) -> tuple[np.ndarray | None, int]:
        """An address operand as (64-bit base array or None, constant offset)."""
        if isinstance(operand.base, Register):
            storage = self.storage(operand.base.name)
            return storage, operand.offset
        if isinstance(operand.base, Symbol):
            return None, self.address_of(operand.base) + operand.offset
        if operand.base is None:
            return None, operand.offset
        raise self.unsupported(f"address {operand}")

    def address_of(self, symbol: Symbol) -> int:
        if symbol.name not in self.symbols:
            raise self.unsupported(f"undefined symbol {symbol.name}")
        return self.symbols[symbol.name] + symbol.offset

    # ---- errors ----------------------------------------------------------------------------------------------------
    def unsupported(self, reason: str) -> UnsupportedInstruction:
        ins = self.instruction
        return UnsupportedInstruction(self.function.name, ins.line if ins else 0, ins.text if ins else "", reason)

    def error(self, kind: str, ins: Instruction, lane: int | None, message: str) -> KernelFault:
        """A fault of one lane, ready to be raised."""
        block = thread = None
        if lane is not None:
            block, thread = self.position("ctaid", lane), self.position("tid", lane)
        return KernelFault(kind, self.kernel.name, ins.line, ins.text, message, source=ins.source, block=block, thread=thread)

    def position(self, register: str, lane: int) -> tuple[int, int, int]:
        """x, y, z of a special register."""
        x, y, z = (int(self.special[f"{register}.{axis}"][lane]) for axis in "xyz")
        return x, y, z

    def fault(self, kind: str, ins: Instruction, lane: int | None, message: str) -> None:
        """Raise a fault whose result can be poisoned, or note it where the caller asked for that."""
        fault = self.error(kind, ins, lane, message)
        if self.collected is None:
            raise fault
        if not any(f.kind == kind and f.line == ins.line for f in self.collected):
            self.collected.append(fault)


def lanes_of(machine: Machine, selection: Selection) -> np.ndarray:
    """The lane numbers of a selection."""
    return np.arange(machine.lanes) if selection is None else selection


def _narrow(storage: np.ndarray, dtype: np.dtype, machine: Machine) -> np.ndarray:
    if (storage.dtype == np.bool_) != (dtype.kind == "b"):
        raise machine.unsupported("a predicate and a data register are mixed")
    if storage.dtype.itemsize == dtype.itemsize:
        return storage.view(dtype)
    if storage.dtype.itemsize < dtype.itemsize:
        raise machine.unsupported(f"a {storage.dtype.itemsize}-byte register is used as a {dtype.itemsize}-byte operand")
    return storage.view(dtype)[:: storage.dtype.itemsize // dtype.itemsize]


def elementwise(function: Callable[..., Any], destination: np.ndarray, *sources: np.ndarray) -> Action:
    """An action that sets destination = function(*sources) lane by lane."""

    def run(selection: Selection) -> None:
        if selection is None:
            destination[...] = function(*sources)
        else:
            destination[selection] = function(*[s[selection] for s in sources])

    def run_in_place(selection: Selection) -> None:
        if selection is None:
            function(*sources, out=destination, casting="unsafe")
        else:
            destination[selection] = function(*[s[selection] for s in sources])

    return run_in_place if isinstance(function, np.ufunc) else run
