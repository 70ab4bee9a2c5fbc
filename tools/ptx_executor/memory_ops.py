"""Loads, stores and address conversions.

Source: PTX ISA, "Data Movement and Conversion Instructions": ld, ldu, st, cvta, isspacep, prefetch.
"""

from __future__ import annotations

import numpy as np

from .decode import Action, instruction, types
from .machine import CONST_WINDOW, DTYPES, LOCAL_WINDOW, SHARED_WINDOW, Machine, Selection, elementwise
from .spaces import RAW, Access, ConstSpace, Space
from .syntax import SPACES, TYPE_BYTES, Address, Instruction, Symbol, Vector

STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}
_HINTS = {
    "weak", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "cta", "cluster", "gpu", "sys", "v2", "v4", "unified",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::cache_hint",
}  # fmt: skip
_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "const": CONST_WINDOW, "param": CONST_WINDOW, "global": 0}


def space_of(machine: Machine, ins: Instruction, address: Address) -> Space:
    """The state space that an instruction addresses; .param is constant for a kernel's parameters, else on the
    stack."""
    name = next((m for m in ins.modifiers if m in SPACES), "generic")
    if name == "param":
        kernel_parameter = not isinstance(address.base, Symbol) or address.base.name in machine.parameters
        name = "const" if kernel_parameter else "local"
    return machine.spaces[name]


def effective_address(machine: Machine, operand: Address) -> tuple[np.ndarray, int]:
    """(base over lanes, offset); the address is their sum."""
    base, offset = machine.address(operand)
    return (np.broadcast_to(np.int64(0), (machine.lanes,)) if base is None else base), offset


def width_of(ins: Instruction) -> int:
    return 4 if "v4" in ins.modifiers else 2 if "v2" in ins.modifiers else 1


def _integer(kind: str) -> str:
    """The type that moves the bits of a type without conversion."""
    return kind if kind.startswith(("s", "u")) else f"b{8 * TYPE_BYTES[kind]}"


def _check(machine: Machine, ins: Instruction) -> str:
    for m in ins.modifiers:
        if m not in TYPE_BYTES and m not in SPACES and m not in _HINTS and m not in STRONG:
            raise machine.unsupported(f"unknown modifier .{m}")
    kind = types(ins)[-1]
    if TYPE_BYTES[kind] * width_of(ins) > 16:
        raise machine.unsupported("an access of more than 16 bytes")
    return _integer(kind)


@instruction("ld", "ldu")
def _ld(machine: Machine, ins: Instruction) -> Action:
    kind, vector = _check(machine, ins), width_of(ins)
    address: Address = ins.operands[1]
    names = ins.operands[0].elements if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    targets = [machine.destination(d, kind) for d in names]
    element, space = np.dtype(DTYPES[kind]), space_of(machine, ins, address)
    base, offset = effective_address(machine, address)
    access = Access(ins, element.itemsize * vector, bool(STRONG & set(ins.modifiers)))
    if isinstance(space, ConstSpace) and isinstance(address.base, Symbol):
        at = machine.address_of(address.base) + address.offset  # the same for all lanes
        raw = space.load(access, np.full(1, at, np.int64), None)
        values = raw.view(element)

        def run_constant(selection: Selection) -> None:
            for target, value in zip(targets, values, strict=True):
                target[... if selection is None else selection] = value

        return run_constant

    def run(selection: Selection) -> None:
        where = (base if selection is None else base[selection]).astype(np.int64) + offset
        raw = space.load(access, where, selection)
        lanes = ... if selection is None else selection
        if vector == 1:
            targets[0][lanes] = raw.view(element)
        else:
            values = raw.view(element).reshape(-1, vector)
            for k, target in enumerate(targets):
                target[lanes] = values[:, k]

    return run


def packed(sources: list[np.ndarray], selection: Selection, size: int) -> np.ndarray:
    """The operands of a vector store as one raw item for each lane."""
    if len(sources) == 1:
        chosen = sources[0] if selection is None else sources[0][selection]
        return np.ascontiguousarray(chosen).view(RAW[size])
    first = sources[0] if selection is None else sources[0][selection]
    joined = np.empty((len(first), len(sources)), first.dtype)
    for k, source in enumerate(sources):
        joined[:, k] = source if selection is None else source[selection]
    return joined.view(RAW[size]).reshape(-1)


@instruction("st")
def _st(machine: Machine, ins: Instruction) -> Action:
    kind = _check(machine, ins)
    values = ins.operands[1].elements if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    sources = [machine.source(v, kind) for v in values]
    size, space = TYPE_BYTES[kind] * len(sources), space_of(machine, ins, ins.operands[0])
    base, offset = effective_address(machine, ins.operands[0])
    access = Access(ins, size, bool(STRONG & set(ins.modifiers)))

    def run(selection: Selection) -> None:
        where = (base if selection is None else base[selection]).astype(np.int64) + offset
        space.store(access, where, packed(sources, selection, size), selection)

    return run


@instruction("cvta")
def _cvta(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    window = next(_WINDOWS[m] for m in ins.modifiers if m in _WINDOWS)
    if kind != "u64" and window:
        raise machine.unsupported("32-bit generic addresses")
    delta = machine.constant(-window if "to" in ins.modifiers else window, "u64")
    return elementwise(np.add, machine.destination(ins.operands[0], "u64"), machine.source(ins.operands[1], "u64"), delta)


@instruction("isspacep")
def _isspacep(machine: Machine, ins: Instruction) -> Action:
    window = next(_WINDOWS[m] for m in ins.modifiers if m in _WINDOWS)
    inside = lambda a: (a >> np.uint64(40) << np.uint64(40) == window) if window else a < SHARED_WINDOW  # noqa: E731
    return elementwise(inside, machine.destination(ins.operands[0], "pred"), machine.source(ins.operands[1], "u64"))


@instruction("createpolicy")
def _createpolicy(machine: Machine, ins: Instruction) -> Action:
    """A cache policy: its bits mean nothing here."""
    return elementwise(lambda nothing: nothing, machine.destination(ins.operands[0], "b64"), machine.constant(0, "b64"))


@instruction("prefetch", "prefetchu", "applypriority")
def _prefetch(machine: Machine, ins: Instruction) -> Action:
    return lambda selection: None
