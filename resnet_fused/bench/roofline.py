"""`resnet-fused roofline`: what each layer must compute and move, before and after fusion, and the bound that follows.

The counts are exact: operations of the convolutions' direct sums, and bytes if every op reads each of its tensors once from
memory and writes its result once. The time is a bound and no measurement: max(operations / peak, bytes / bandwidth), summed
over the ops. Two things may beat it: an algorithm with fewer operations than the direct sum (Winograd), and a cache that keeps
a tensor from one op to the next.

Source: Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from resnet_fused.backends.problem import Activation, Conv, Linear, Problem, Step, Types
from resnet_fused.bench import layers, options, scaling
from resnet_fused.bench.peaks import measure_bandwidth, measure_peak
from resnet_fused.bench.workloads import DTYPES, Workload

STOCK, LAYERS, WHOLE = "stock", "layers", "whole"


class Work(NamedTuple):
    """What one op does: floating-point operations of its convolutions, a multiply-add counting as two, and bytes moved."""

    operations: int
    moved: int


def work(problem: Problem) -> dict[str, list[Work]]:
    """The ops that compute a problem in inference: as stock has them, with each convolution fused, and as a whole.

    Stock: convolution, batch norm, sum, ReLU (both in place) and max-pool are an op each. Layers: a convolution has its batch
    norm, sum and ReLU with it. Whole: one op, whose results inside are never moved.
    """
    element, shapes = problem.types.source.itemsize, problem.shapes()
    found: dict[str, list[Work]] = {STOCK: [], LAYERS: [], WHOLE: []}

    def op(level: str, operations: int, *elements: int) -> None:
        found[level].append(Work(operations, sum(elements) * element))

    operations = parameters = 0
    for step in problem.steps:
        conv, epilogue = step.operation, step.epilogue
        if isinstance(conv, Linear):
            conv = Conv(*conv, (1, 1))
        if not isinstance(conv, Conv):
            continue
        source = shapes[step.reads[0]]
        sums = Step(conv).result_shape(source)
        x, y, result = math.prod(source), math.prod(sums), math.prod(step.result_shape(source))
        taps = conv.in_channels // conv.groups * conv.kernel[0] * conv.kernel[1]
        weight, own = conv.out_channels * taps, 2 * y * taps
        op(STOCK, own, x, weight, y)
        op(STOCK, 0, y, 4 * conv.out_channels, y)  # batch norm: mean, variance, gamma, beta
        if epilogue.residual:
            op(STOCK, 0, y, y, y)
        if epilogue.activation is not Activation.NONE:
            op(STOCK, 0, y, y)
        op(LAYERS, own, x, weight, conv.out_channels, *((y,) if epilogue.residual else ()), y)
        if epilogue.pool is not None:
            for level in (STOCK, LAYERS):
                op(level, 0, y, result)
        operations, parameters = operations + own, parameters + weight + conv.out_channels
    result = math.prod(problem.output_shape())
    residual = (result,) if problem.reads_residual else ()  # a block's is its input, or stays inside
    op(WHOLE, operations, math.prod(problem.shape), *residual, parameters, result)
    return found


@dataclass(frozen=True)
class Machine:
    """Arithmetic peak in GFLOP/s and memory bandwidth in GB/s."""

    peak: float
    bandwidth: float

    def bound(self, ops: list[Work]) -> float:
        """The least time for ops one after the other, ms."""
        return sum(max(op.operations / self.peak, op.moved / self.bandwidth) for op in ops) * 1e-6

    @classmethod
    def measured(cls, dtype: str, device: str) -> Machine | None:
        """Of this machine, for a dtype; None where its peak can't be measured."""
        peak = measure_peak(DTYPES[dtype], device)
        return None if peak is None else cls(peak, measure_bandwidth(device))

    def bound_of(self, problems: Mapping[Problem, int]) -> float:
        """The least time for these problems, each so often, with every convolution fused, ms."""
        return sum(self.bound(work(problem)[LAYERS]) * count for problem, count in problems.items())

    def limit(self, op: Work) -> str:
        """What an op's bound comes from."""
        return "arithmetic" if op.operations / self.peak >= op.moved / self.bandwidth else "memory"


@functools.cache
def problems(model: str, size: tuple[int, ...]) -> Counter[Problem]:
    """What a model poses for one image in float32 on the CPU: the layers are the same for every batch, dtype and device."""
    return layers.problems(Workload(model, 1, "float32", size))


def moved(problems: Mapping[Problem, int]) -> int:
    """Bytes that the ops of these problems read and write, with every convolution fused."""
    return sum(op.moved * count for problem, count in problems.items() for op in work(problem)[LAYERS])


def posed(workload: Workload) -> dict[Problem, int]:
    """The problems of a workload, and how often each occurs."""
    dtype, device = DTYPES[workload.dtype], torch.device(workload.device)
    return {
        replace(problem, shape=(workload.batch, *problem.shape[1:]), types=Types.of(dtype), device=device): count
        for problem, count in problems(workload.model, workload.size).items()
    }


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    models = options.models(arguments.models)
    dtypes = options.names("--dtypes", arguments.dtypes, options.DTYPES)
    batches = options.integers("--batches", arguments.batches)
    size = options.size(arguments.size)
    device = options.usable_device(arguments.device)
    options.set_threads(arguments.threads)
    for option, value in (("--peak", arguments.peak), ("--bandwidth", arguments.bandwidth)):
        if value is not None:
            options.positive(option, value)
    if arguments.plot is not None:
        options.folder("--plot", arguments.plot.parent)
    threads = None if arguments.scaling is None else options.integers("--scaling", arguments.scaling)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160 if threads is None else 240)
    if threads is not None:
        for workload in (Workload(*one, size) for one in itertools.product(models, batches, dtypes)):
            scaling.print_table(console, str(workload), posed(workload), threads)
        return 0
    points: dict[str, tuple[Machine, list[Problem]]] = {}
    bandwidth = arguments.bandwidth or measure_bandwidth(device)
    for dtype in dtypes:
        machine = Machine(arguments.peak or _measured_peak(dtype, device), bandwidth)
        for model in models:
            for batch in batches:
                workload = Workload(model, batch, dtype, size)
                counts = posed(workload)
                if not counts:
                    console.print(f"{workload}: rf.fuse found nothing in it to fuse, and so to count", highlight=False)
                    continue
                points[str(workload)] = (machine, list(counts))
                _print(console, workload, machine, counts)
    if arguments.plot is not None and points:
        _plot(arguments.plot, points)
        console.print(f"Saved {arguments.plot}", highlight=False)
    return 0


def _measured_peak(dtype: str, device: str) -> float:
    peak = measure_peak(DTYPES[dtype], device)
    if peak is None:
        raise options.UserError(
            "the peak can't be measured without the compiled CPU kernels, which are missing here; "
            "give it in GFLOP/s with --peak"
        )
    return peak


def _print(console: Console, workload: Workload, machine: Machine, counts: dict[Problem, int]) -> None:
    console.print(
        f"{workload}; peak {machine.peak:.0f} GFLOP/s, memory bandwidth {machine.bandwidth:.0f} GB/s\n"
        "Bounds, not measurements: direct sums, every tensor read and written in memory by each op. Winograd and caches may "
        "beat them.\nstock: op by op; layers: each convolution with what follows it; whole: the layer as one op.",
        highlight=False,
    )
    table = Table(header_style="bold")
    levels = (STOCK, LAYERS, WHOLE)
    numbers = [f"{what}\n{level}" for what in ("MB", "FLOP/B", "bound, ms") for level in levels]
    for name in ("layer", "input", "×", "GFLOP", *numbers, "whole\nlimited by"):
        table.add_column(name, justify="left" if name in ("layer", "input", "whole\nlimited by") else "right")
    every: dict[str, list[Work]] = {level: [] for level in levels}
    for problem, count in counts.items():
        ops = work(problem)
        for level in levels:
            every[level] += ops[level] * count
        shape, limit = "×".join(map(str, problem.shape)), machine.limit(ops[WHOLE][0])
        table.add_row(layers.describe(problem), shape, str(count), *_cells(machine, ops), limit)
    table.add_section()
    table.add_row("all of them", "", str(sum(counts.values())), *_cells(machine, every), "", style="bold")
    console.print(table)


def _cells(machine: Machine, ops: dict[str, list[Work]]) -> list[str]:
    operations = sum(op.operations for op in ops[WHOLE])
    moved = [sum(op.moved for op in level) for level in ops.values()]
    return [
        f"{operations * 1e-9:.3f}",
        *(f"{count * 1e-6:.2f}" for count in moved),
        *(f"{operations / count:.1f}" for count in moved),
        *(f"{machine.bound(level):.3f}" for level in ops.values()),
    ]


def _plot(path: Path, points: dict[str, tuple[Machine, list[Problem]]]) -> None:
    """Operations a second over operations a byte, both logarithmic: the roof, and each layer before and after fusion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(points), figsize=(6.4 * len(points), 4.8), layout="constrained", squeeze=False)
    for axes, (title, (machine, problems)) in zip(all_axes[0], points.items(), strict=True):
        ends = [machine.peak / machine.bandwidth]
        for level, color in ((STOCK, "#9aa5b1"), (LAYERS, "#30638e"), (WHOLE, "#d1495b")):
            ops = [work(problem)[level] for problem in problems]
            operations = [sum(op.operations for op in each) for each in ops]
            intensities = [o / sum(op.moved for op in each) for o, each in zip(operations, ops, strict=True)]
            rates = [o / machine.bound(each) * 1e-6 for o, each in zip(operations, ops, strict=True)]
            axes.plot(intensities, rates, "o", label=level, color=color, markersize=5)
            ends += intensities
        roof = sorted((min(ends) / 2, machine.peak / machine.bandwidth, max(ends) * 2))
        axes.plot(roof, [min(machine.peak, i * machine.bandwidth) for i in roof], color="black", linewidth=1, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOP per byte of memory traffic")
        axes.set_ylabel("bound, GFLOP/s")
        axes.set_title(f"{title}\nbounds, not measurements", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
