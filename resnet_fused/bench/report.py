"""Shows comparisons: a table in the terminal and a chart as PNG."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from resnet_fused.bench import variants
from resnet_fused.bench.inference import Comparison, describe


def print_table(console: Console, comparisons: list[Comparison], machine: dict[str, object]) -> None:
    """A row for each variant and workload."""
    if not console.is_terminal:
        console = Console(width=160)
    console.print(
        f"{describe(machine)}, {machine['architecture' if 'gpu' in machine else 'capability']}, PyTorch {machine['torch']}; "
        "medians of interleaved runs",
        highlight=False,
    )
    table = Table(title="Inference", title_justify="left", header_style="bold")
    columns = ("workload", "variant", "ms", "± IQR", "images/s", "time / ours", "error vs float64", "")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in (0, 1, 7) else "right", no_wrap=i < 7)
    for comparison in comparisons:
        for i, result in enumerate(comparison.results):
            ours = result.variant == variants.OURS
            timed = result.calls > 0
            ratio = comparison.ratio(result.variant)
            table.add_row(
                str(comparison.workload) if i == 0 else "",
                result.variant,
                f"{result.median:.{1 if result.median >= 10 else 2}f}" if timed else "–",
                f"{result.spread:.0%}" if timed else "–",
                f"{comparison.images_per_second(result):.1f}" if timed else "–",
                f"{ratio:.2f}×" if timed and ratio == ratio else "–",
                f"{result.error:.1e}" if result.error == result.error else "–",
                result.note,
                style="bold" if ours else None,
                end_section=i == len(comparison.results) - 1,
            )
    console.print(table)


def save_chart(path: Path, comparisons: list[Comparison], machine: dict[str, object]) -> None:
    """Bars of images a second, relative to stock eager, one group a workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [r.variant for r in comparisons[0].results]
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 + 1.6 * len(comparisons)), 4.8), layout="constrained")
    width = 0.8 / len(names)
    colors = {
        variants.OURS: "#d1495b",
        variants.EAGER: "#9aa5b1",
        variants.CHANNELS_LAST: "#62707e",
        variants.COMPILE: "#30638e",
        variants.COMPILE_GRAPHS: "#7fa6c9",
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
