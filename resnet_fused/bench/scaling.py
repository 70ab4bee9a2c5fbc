"""`resnet-fused roofline --scaling 1,2,…`: how the work of each layer divides among more threads than this machine may have.

For each number of threads the CPU kernels cut up a layer as they do for it, and one thread runs all shares, one after the
other, and times each. What this shows is the cut: how many units of work there are, how long one takes, and how evenly they
divide. What it doesn't show is what threads cost each other (memory, caches, the barrier between two layers), so the
efficiency that follows is a bound and no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from resnet_fused.backends import BackendError, Problem
from resnet_fused.backends.accuracy import inputs_of, more_inputs_of, parameters_of
from resnet_fused.backends.binding import bind
from resnet_fused.bench import layers

_REPEATS = 20


@dataclass(frozen=True)
class Division:
    """How a layer divides among a number of threads. A layer may have several parallel regions, one after the other.

    Attributes:
        threads: how many there are.
        units: of work, in all regions.
        unit: how long one takes on average, microseconds.
        total: the time of all shares together, microseconds.
        longest: that of each region's longest share, summed over the regions, microseconds.
        alone: the time of one thread that does everything, microseconds.
    """

    threads: int
    units: int
    unit: float
    total: float
    longest: float
    alone: float

    @property
    def balance(self) -> float:
        """The mean of the shares over the longest: 1 where all threads finish together."""
        return self.total / (self.threads * self.longest)

    @property
    def efficiency(self) -> float:
        """The bound on speed-up over threads: what each thread does for itself counts against it, too."""
        return self.alone / (self.threads * self.longest)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def divisions(problem: Problem, counts: Sequence[int]) -> list[Division] | None:
    """How a layer divides among each of these numbers of threads; None where the CPU kernels don't serve it."""
    parameters = parameters_of(problem)
    inputs = *inputs_of(problem), *more_inputs_of(problem)
    found = []
    alone = math.nan
    for count in (1, *counts):
        with _threads(count):
            try:
                kernel = bind(problem, parameters, "cpu").kernel
            except BackendError:
                return None
            kernel(*inputs)  # packs the weights
            regions = _regions(lambda: kernel(*inputs))  # noqa: B023
        units, shares = sum(units for units, _ in regions), [share for _, own in regions for share in own]
        total, longest = sum(shares), sum(max(own) for _, own in regions)
        if math.isnan(alone):
            alone = total
            continue
        found.append(Division(count, units, total / units, total, longest, alone))
    return found


def _regions(call: object) -> list[tuple[int, list[float]]]:
    """Units and microseconds of each thread's share, for each parallel region of a call; the least of a few calls."""
    ops = torch.ops.resnet_fused_cpu
    found: list[tuple[int, list[float]]] = []
    for repeat in range(_REPEATS):
        ops.begin_shares(repeat)  # each share is once the first, which finds the caches cold, and else isn't
        try:
            call()  # type: ignore[operator]
        finally:
            numbers = ops.end_shares()
        regions = []
        while numbers:
            units, threads, *numbers = numbers
            own, numbers = numbers[:threads], numbers[threads:]
            regions.append((units, [nanoseconds * 1e-3 for nanoseconds in own]))
        found = [(u, [*map(min, old, new)]) for (u, old), (_, new) in zip(found, regions, strict=True)] if found else regions
    return found


def print_table(console: Console, title: str, problems: dict[Problem, int], counts: Sequence[int]) -> None:
    """A row for each kind of layer: balance, efficiency and microseconds a unit, for each number of threads."""
    console.print(
        f"{title}: how the CPU kernels divide each layer among threads\n"
        "Cells: balance (mean of the threads' shares over the longest), bound on the efficiency (speed-up over threads;\nwhat "
        "each thread does for itself counts against it), and microseconds of one core for a unit of work. Shares are timed\n"
        "one after the other on one thread: barriers, memory and caches that are shared don't count.",
        highlight=False,
    )
    table = Table(header_style="bold")
    for name in ("layer", "input", "×", "ms alone", *(f"{count}\nthreads" for count in counts)):
        table.add_column(name, justify="left" if name in ("layer", "input") else "right")
    every: list[list[tuple[int, Division]]] = [[] for _ in counts]
    for problem, count in problems.items():
        shape, found = "×".join(map(str, problem.shape)), divisions(problem, counts)
        if found is None:
            table.add_row(layers.describe(problem), shape, str(count), *("–" for _ in (0, *counts)))
            continue
        for column, division in zip(every, found, strict=True):
            column.append((count, division))
        table.add_row(
            *(layers.describe(problem), shape, str(count), f"{found[0].alone * 1e-3:.3f}"),
            *(f"{d.balance:.0%} {d.efficiency:.0%} {d.unit:.0f}" for d in found),
        )
    if every[0]:
        sums = [summary(column) for column in every]
        table.add_section()
        table.add_row(
            *("all of them", "", str(sum(problems.values())), f"{sums[0].alone * 1e-3:.3f}"),
            *(f"{d.balance:.0%} {d.efficiency:.0%} {d.unit:.0f}" for d in sums),
            style="bold",
        )
    console.print(table)


def summary(column: Sequence[tuple[int, Division]]) -> Division:
    """Layers one after the other, each so often, as one."""

    def weighted(name: str) -> float:
        return sum(count * getattr(division, name) for count, division in column)

    units = int(weighted("units"))
    return Division(
        column[0][1].threads, units, weighted("total") / units, weighted("total"), weighted("longest"), weighted("alone")
    )
