"""What a launch did, in exact counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .errors import KernelFault


@dataclass
class Traffic:
    """Accesses of one kind.

    ``requests``: warp-level accesses. ``bytes``: that lanes asked for. ``units``: 32-byte sectors (global) or
    wavefronts (shared). ``ideal``: the fewest units: distinct bytes of each request / 32 for global memory, one
    wavefront for each group of lanes that is served together for shared memory.
    """

    requests: int = 0
    bytes: int = 0
    units: int = 0
    ideal: float = 0.0

    def add(self, requests: int, nbytes: int, units: int, ideal: float) -> None:
        self.requests += requests
        self.bytes += nbytes
        self.units += units
        self.ideal += ideal

    @property
    def factor(self) -> float:
        """units / ideal; 1.0 is as good as it gets."""
        return self.units / self.ideal if self.ideal else 1.0


@dataclass
class Line:
    """Traffic of one memory instruction: ``kind`` is a key of Counters.traffic."""

    kind: str
    instruction: str
    source: str
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class Counters:
    """Counts of one launch.

    ``warp_instructions`` and ``thread_instructions`` by class (see classes.py), ``opcodes`` (warp level); ``tensor``:
    'shape.types' -> (warp instructions, FLOPs); ``flops`` by 'tensor', 'fp32', 'fp16', 'fp64'; ``traffic`` by
    kind: global_load, global_store, global_atomic, cp_async_global (sectors); shared_load, shared_store, shared_atomic,
    ldmatrix, stmatrix, cp_async_shared (wavefronts); ``lines``: the same for each PTX line; ``bytes_read`` and
    ``bytes_written``: distinct global bytes touched, the compulsory traffic; ``barriers``: block barriers completed;
    ``faults``: what was found where the launch was asked to collect faults; ``printed``: what printf() printed.
    """

    kernel: str
    blocks: int = 0
    threads: int = 0
    shared_bytes: int = 0
    warp_instructions: Counter = field(default_factory=Counter)
    thread_instructions: Counter = field(default_factory=Counter)
    opcodes: Counter = field(default_factory=Counter)
    tensor: dict[str, tuple[int, int]] = field(default_factory=dict)
    flops: Counter = field(default_factory=Counter)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    lines: dict[tuple[int, str], Line] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    barriers: int = 0
    faults: list[KernelFault] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def of(self, kind: str) -> Traffic:
        """The traffic of one kind, zero where there was none."""
        return self.traffic.get(kind, Traffic())

    @property
    def global_sectors(self) -> int:
        return sum(t.units for k, t in self.traffic.items() if k in GLOBAL_KINDS)

    @property
    def global_factor(self) -> float:
        """Sectors over the ideal, over all global accesses."""
        ideal = sum(t.ideal for k, t in self.traffic.items() if k in GLOBAL_KINDS)
        return self.global_sectors / ideal if ideal else 1.0

    @property
    def shared_wavefronts(self) -> int:
        return sum(t.units for k, t in self.traffic.items() if k in SHARED_KINDS)

    @property
    def shared_factor(self) -> float:
        """Wavefronts over the ideal, over all shared accesses: 1.0 means free of bank conflicts."""
        ideal = sum(t.ideal for k, t in self.traffic.items() if k in SHARED_KINDS)
        return self.shared_wavefronts / ideal if ideal else 1.0

    def worst(self, count: int = 10) -> list[tuple[int, Line]]:
        """The memory instructions with the most units above the ideal: (PTX line, Line), worst first."""
        lines = [(line, entry) for (line, _), entry in self.lines.items() if entry.traffic.units > entry.traffic.ideal]
        return sorted(lines, key=lambda item: item[1].traffic.ideal - item[1].traffic.units)[:count]

    def summary(self) -> str:
        """The counts as text, one topic a line."""
        shape = f"{self.blocks} blocks of {self.threads} threads, {self.shared_bytes} bytes of shared memory"
        rows = [f"kernel {self.kernel}: {shape}"]
        rows.append("  warp instructions: " + ", ".join(f"{k} {v}" for k, v in self.warp_instructions.most_common()))
        rows += [f"  tensor {k}: {n} warp instructions, {f} FLOPs" for k, (n, f) in self.tensor.items()]
        rows.append("  FLOPs: " + ", ".join(f"{k} {v}" for k, v in self.flops.items()))
        for kind in (*GLOBAL_KINDS, *SHARED_KINDS):
            if t := self.traffic.get(kind):
                unit = "sectors" if kind in GLOBAL_KINDS else "wavefronts"
                work = f"{t.requests} requests, {t.bytes} bytes, {t.units} {unit}"
                rows.append(f"  {kind}: {work}, ideal {t.ideal:g}, factor {t.factor:.3f}")
        rows.append(f"  distinct global bytes: read {self.bytes_read}, written {self.bytes_written}")
        rows.append(f"  barriers {self.barriers}")
        rows += [f"  FAULT {fault}" for fault in self.faults]
        return "\n".join(rows)


GLOBAL_KINDS = ("global_load", "global_store", "global_atomic", "cp_async_global")
SHARED_KINDS = ("shared_load", "shared_store", "shared_atomic", "ldmatrix", "stmatrix", "cp_async_shared")


def sectors(addresses: np.ndarray, size: int, first: int) -> tuple[int, int, float]:
    """(requests, 32-byte sectors, ideal) of warps' accesses.

    ``addresses``: (warps, 32) byte addresses aligned to ``size``, -1 for lanes that take no part; ``first`` is the
    lowest valid one. Addresses of one warp that are equal count once.
    """
    rows = addresses
    if not (rows[:, 1:] >= rows[:, :-1]).all():
        rows = np.sort(rows, axis=1)
    step = rows[:, 1:] != rows[:, :-1]
    active = rows[:, -1] >= first
    idle = np.count_nonzero(rows[:, 0] < first)  # rows that begin with the -1 of idle lanes
    distinct = np.count_nonzero(step) + len(rows) - idle
    sector = rows >> 5
    units = np.count_nonzero(sector[:, 1:] != sector[:, :-1]) + len(rows) - idle
    return int(np.count_nonzero(active)), int(units), float(distinct * size / 32)


def wavefronts(words: np.ndarray) -> tuple[int, int]:
    """(wavefronts, ideal) of shared-memory accesses; 32 banks of 4 bytes, lanes of one word share it.

    ``words``: (groups, 32) word addresses, a row for the lanes served together; -1 for lanes that take no part.
    """
    top = words.max(axis=1)
    active = top >= 0
    if not active.all():
        words, top = words[active], top[active]
    groups = len(words)
    if not groups:
        return 0, 0
    words = np.where(words < 0, top[:, None], words)
    slot = (words & 31) + (np.arange(groups) << 5)[:, None]
    table = np.empty(groups << 5, words.dtype)
    table[slot] = words
    clash = (table[slot] != words).any(axis=1)
    if not clash.any():
        return groups, groups
    rows = np.sort(words[clash], axis=1)
    new = np.ones(rows.shape, bool)
    new[:, 1:] = rows[:, 1:] != rows[:, :-1]
    slot = (rows & 31) + (np.arange(len(rows)) << 5)[:, None]
    most = np.bincount(slot[new], minlength=len(rows) << 5).reshape(-1, 32).max(axis=1)
    return groups - len(rows) + int(most.sum()), groups
