"""Exchange between the lanes of a warp.

Source: PTX ISA, "shfl.sync", and "Parallel Synchronization and Communication Instructions": vote.sync, match.sync,
redux.sync, activemask.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .decode import Action, allow, instruction, types
from .machine import DTYPES, Machine, Selection
from .syntax import Immediate, Instruction, Pair


def member_mask(machine: Machine, ins: Instruction) -> np.ndarray | None:
    """The member mask of a .sync instruction over lanes; None where it is all ones (or implied by .aligned)."""
    if ins.opcode not in ("shfl", "vote", "match", "redux", "bar"):
        return None
    operand = ins.operands[-1]
    if isinstance(operand, Immediate) and int(operand.value) & 0xFFFFFFFF == 0xFFFFFFFF:
        return None
    return machine.source(operand, "b32")


def _rows(machine: Machine, array: np.ndarray, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """(values as (warps, 32), which of those lanes take part); for the warps that the selection touches."""
    if selection is None:
        return array.reshape(-1, 32), np.ones((machine.lanes // 32, 32), bool)
    warps = np.unique(selection >> 5)
    active = np.zeros((machine.lanes // 32, 32), bool)
    active.reshape(-1)[selection] = True
    return array.reshape(-1, 32)[warps], active[warps]


@instruction("shfl")
def _shfl(machine: Machine, ins: Instruction) -> Action:
    mode = next(m for m in ins.modifiers if m in ("up", "down", "bfly", "idx"))
    first = ins.operands[0]
    value_name, valid_name = (first.first, first.second) if isinstance(first, Pair) else (first, None)
    target, valid = machine.destination(value_name, "b32"), machine.destination(valid_name, "pred")
    a, b, c = (machine.source(o, "b32") for o in ins.operands[1:4])
    lane = np.arange(32)

    def run(selection: Selection) -> None:
        values, active = _rows(machine, a, selection)
        amounts, _ = _rows(machine, b, selection)
        controls, _ = _rows(machine, c, selection)
        amount, clamp, segment = (
            (amounts & 31).astype(np.int64),
            (controls & 31).astype(np.int64),
            (controls >> 8 & 31).astype(np.int64),
        )
        high = (lane & segment) | (clamp & ~segment)
        low = lane & segment
        if mode == "up":
            source = lane - amount
            inside = source >= high
        elif mode == "idx":
            source = low | (amount & ~segment)
            inside = source <= high
        else:
            source = lane + amount if mode == "down" else lane ^ amount
            inside = source <= high
        source = np.where(inside, source, lane)
        moved = np.take_along_axis(values, source, axis=1)
        absent = ~np.take_along_axis(active, source, axis=1) & active
        if absent.any():
            where = np.flatnonzero(absent)[0]
            warps = np.arange(machine.lanes // 32) if selection is None else np.unique(selection >> 5)
            bad = int(warps[where // 32]) * 32 + int(where % 32)
            machine.fault(
                "member-mask", ins, bad, f"reads from lane {int(source.reshape(-1)[where])}, which does not take part"
            )
            moved = np.where(absent, np.uint32(0xFFFFFFFF), moved)
        if selection is None:
            target[:], valid[:] = moved.reshape(-1), inside.reshape(-1)
        else:
            target[selection], valid[selection] = moved[active], inside[active]

    return run


def _spread(machine: Machine, target: np.ndarray, selection: Selection, active: np.ndarray, result: np.ndarray) -> None:
    """Write one value for each warp to its lanes that take part."""
    lanes = np.broadcast_to(result[:, None], active.shape)
    if selection is None:
        target[:] = lanes.reshape(-1)
    else:
        target[selection] = lanes[active]


_BITS = np.uint64(1) << np.arange(32, dtype=np.uint64)


def _ballot(flags: np.ndarray) -> np.ndarray:
    return (flags * _BITS).sum(axis=1).astype(np.uint32)


@instruction("vote")
def _vote(machine: Machine, ins: Instruction) -> Action:
    mode = next(m for m in ins.modifiers if m in ("all", "any", "uni", "ballot"))
    target = machine.destination(ins.operands[0], "b32" if mode == "ballot" else "pred")
    predicate, negated = machine.predicate(ins.operands[1])

    def run(selection: Selection) -> None:
        values, active = _rows(machine, predicate, selection)
        yes = (values ^ negated) & active
        votes = {
            "ballot": lambda: _ballot(yes),
            "any": lambda: yes.any(axis=1),
            "all": lambda: (yes == active).all(axis=1),
            "uni": lambda: (yes == active).all(axis=1) | ~yes.any(axis=1),
        }
        _spread(machine, target, selection, active, votes[mode]())

    return run


@instruction("activemask")
def _activemask(machine: Machine, ins: Instruction) -> Action:
    target = machine.destination(ins.operands[0], "b32")

    def run(selection: Selection) -> None:
        _, active = _rows(machine, target, selection)
        _spread(machine, target, selection, active, _ballot(active))

    return run


@instruction("match")
def _match(machine: Machine, ins: Instruction) -> Action:
    kind, every = types(ins)[-1], "all" in ins.modifiers
    first = ins.operands[0]
    mask_name, flag_name = (first.first, first.second) if isinstance(first, Pair) else (first, None)
    target, flag = machine.destination(mask_name, "b32"), machine.destination(flag_name, "pred")
    source = machine.source(ins.operands[1], kind)

    def run(selection: Selection) -> None:
        values, active = _rows(machine, source, selection)
        equal = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        masks = (equal * _BITS).sum(axis=2).astype(np.uint32)
        if every:
            agree = (equal | ~active[:, None, :]).all(axis=2)
            masks = np.where(agree, masks, np.uint32(0))
        else:
            agree = active
        lanes = slice(None) if selection is None else selection
        target[lanes], flag[lanes] = masks[active], agree[active]

    return run


@instruction("redux")
def _redux(machine: Machine, ins: Instruction) -> Action:
    kind = types(ins)[-1]
    operation = next(m for m in ins.modifiers if m in ("add", "min", "max", "and", "or", "xor"))
    allow(machine, ins, operation, "sync")
    dtype = np.dtype(DTYPES[kind])
    target, source = machine.destination(ins.operands[0], kind), machine.source(ins.operands[1], kind)
    info: Any = np.iinfo(dtype)
    ufunc, neutral = {
        "add": (np.add, 0), "min": (np.minimum, info.max), "max": (np.maximum, info.min),
        "and": (np.bitwise_and, -1 if info.min < 0 else info.max), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[operation]  # fmt: skip

    def run(selection: Selection) -> None:
        values, active = _rows(machine, source, selection)
        result = ufunc.reduce(np.where(active, values, dtype.type(neutral)), axis=1, dtype=dtype)
        _spread(machine, target, selection, active, result)

    return run
