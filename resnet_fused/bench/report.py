"""Shows comparisons and layers: tables in the terminal, and a chart as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from resnet_fused.bench import layers, variants
from resnet_fused.bench.inference import Comparison, Result, describe
from resnet_fused.bench.layers import LayerResult
from resnet_fused.bench.roofline import Machine
from resnet_fused.bench.workloads import Workload


def print_table(console: Console, comparisons: list[Comparison], machine: dict[str, object]) -> None:
    """A row for each variant and workload."""
    gpu = "gpu" in machine
    if not console.is_terminal:
        console = Console(width=190 if gpu else 160)
    console.print(
        f"{describe(machine)}, {machine['architecture' if gpu else 'capability']}, PyTorch {machine['torch']}; "
        "medians of interleaved runs",
        highlight=False,
    )
    table = Table(title="Inference", title_justify="left", header_style="bold")
    for column in ("workload", *columns(gpu)):
        table.add_column(column, justify="left" if column in ("workload", "variant", "") else "right", no_wrap=column != "")
    for comparison in comparisons:
        for i, result in enumerate(comparison.results):
            workload = str(comparison.workload) if i == 0 else ""
            style = "bold" if result.variant == variants.OURS else None
            last = i == len(comparison.results) - 1
            table.add_row(workload, *cells(comparison, result, gpu), style=style, end_section=last)
    console.print(table)
    for comparison in comparisons:
        if comparison.bound is not None:
            moved = comparison.moved / comparison.workload.batch * 1e-6
            text = f"{comparison.workload}: bound {comparison.bound:.3f} ms (no measurement), {moved:.1f} MB an image"
            console.print(text, highlight=False)


def columns(gpu: bool) -> list[str]:
    """Names of the `cells`."""
    on_gpu = ("GPU ms", "bound / GPU ms") if gpu else ()
    return ["variant", "ms", "± IQR", *on_gpu, "images/s", "time / ours", "error vs float64", "first call, s", ""]


def cells(comparison: Comparison, result: Result, gpu: bool) -> list[str]:
    """What is told of a variant; a dash for what wasn't measured."""

    def cell(value: float, format: str) -> str:
        return format.format(value) if value == value else "–"

    bound = float("nan") if comparison.bound is None else comparison.bound
    on_gpu = [cell(result.gpu, "{:.3f}"), cell(bound / result.gpu, "{:.0%}")] if gpu else []
    return [
        result.variant,
        cell(result.median, "{:.1f}" if result.median >= 10 else "{:.2f}"),
        cell(result.spread, "{:.0%}"),
        *on_gpu,
        cell(comparison.images_per_second(result), "{:.1f}"),
        cell(comparison.ratio(result.variant), "{:.2f}×"),
        cell(result.error, "{:.1e}"),
        cell(result.first_call, "{:.2f}"),
        result.note,
    ]


def print_layers(console: Console, workload: Workload, results: list[LayerResult], machine: Machine | None) -> None:
    """A row for each kind of layer: the automatic choice's GFLOP/s, its share of what is possible, and every time."""
    gpu = workload.device != "cpu"
    if not console.is_terminal:
        console = Console(width=160)
    where = workload.device if gpu else f"{torch.get_num_threads()} threads"
    peak = f"peak {machine.peak:.0f} GFLOP/s, memory {machine.bandwidth:.0f} GB/s" if machine else "peak not measured"
    console.print(f"{workload}; {where}, {peak}; GFLOP/s count the direct sum", highlight=False)
    table = Table(header_style="bold")
    backends = sorted({name for result in results for name in result.milliseconds})
    share = "of bound" if gpu else "of peak"
    for name in ("layer", "input", "×", "chosen", "GFLOP/s", share, *(f"{b}, ms" for b in backends)):
        table.add_column(name, justify="left" if name in ("layer", "input", "chosen") else "right", no_wrap=True)
    for result in results:
        fastest = min(result.milliseconds, key=result.milliseconds.__getitem__)
        reached = None
        if machine is not None:
            bound = machine.bound_of({result.problem: 1})
            reached = bound / result.milliseconds["auto"] if gpu else result.gflops / machine.peak
        times = {backend: f"{ms:.{3 if gpu else 2}f}" for backend, ms in result.milliseconds.items()}
        times[fastest] = f"[bold]{times[fastest]}[/bold]"
        table.add_row(
            layers.describe(result.problem),
            "×".join(map(str, result.problem.shape)),
            str(result.count),
            result.chosen,
            f"{result.gflops:.0f}",
            f"{reached:.0%}" if reached is not None else "–",
            *(times.get(backend, "–") for backend in backends),
        )
    console.print(table)


def save_chart(path: Path, comparisons: list[Comparison], machine: dict[str, object]) -> None:
    """Bars of images a second, relative to stock eager, one group a workload that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    comparisons = [comparison for comparison in comparisons if any(result.calls for result in comparison.results)]
    names = [result.variant for result in comparisons[0].results]
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 + 1.6 * len(comparisons)), 4.8), layout="constrained")
    width = 0.8 / len(names)
    colors = {
        variants.OURS: "#d1495b",
        variants.EAGER: "#9aa5b1",
        variants.CHANNELS_LAST: "#62707e",
        variants.COMPILE: "#30638e",
        variants.COMPILE_GRAPHS: "#7fa6c9",
        variants.OURS_GRAPH: "#e08a97",
    }
    for i, name in enumerate(names):
        heights = []
        for comparison in comparisons:
            by_name = {r.variant: r for r in comparison.results}
            heights.append(by_name[variants.EAGER].median / by_name[name].median)
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(comparisons))]
        bars = axes.bar(places, heights, width * 0.94, label=name, color=colors.get(name))
        axes.bar_label(bars, [f"{h:.2f}" if h == h else "" for h in heights], fontsize=7, padding=1)
    labels = [f"{c.workload.model}\nbatch {c.workload.batch}\n{c.workload.dtype}" for c in comparisons]
    axes.set_xticks(range(len(comparisons)), labels)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_ylabel(f"speed relative to {variants.EAGER}")
    axes.set_title(f"Inference on {describe(machine)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper left", bbox_to_anchor=(0, -0.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
