"""`resnet-fused bench --zoo`: is a fused model never slower than stock? Many models, a row for each, and geometric means."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from resnet_fused.bench import inference, variants
from resnet_fused.bench.inference import Comparison, Result
from resnet_fused.bench.workloads import Workload
from resnet_fused.bench.zoo_models import ENTRIES
from resnet_fused.text import markdown


@dataclass(frozen=True)
class ZooWorkload(Workload):
    """A model of the zoo, by its name there."""

    def create(self) -> nn.Module:
        return ENTRIES[self.model].create()


@dataclass
class ZooRow:
    """A model of the zoo at one batch size. Numbers that weren't measured are NaN.

    Attributes:
        stock: which of stock's two memory formats is the faster.
        stock_ms, ours_ms, compiled_ms: medians, milliseconds a call.
        same_ms: stock's in the memory format that ours is given, contiguous.
        ratio: stock's time to ours: above 1, ours is faster.
        spread: the larger distance between quartiles of stock's and our times, relative to the median.
        error, stock_error: relative errors against float64 of ours, and of stock, by which ours is judged: the larger one of
            its two memory formats.
        fused, convolutions: how many are fused, and how many there are.
        left: the most frequent reason why others are not, and how many it holds for.
        note: why a variant has no time.
    """

    workload: Workload
    stock: str = ""
    stock_ms: float = math.nan
    ours_ms: float = math.nan
    compiled_ms: float = math.nan
    same_ms: float = math.nan
    spread: float = math.nan
    error: float = math.nan
    stock_error: float = math.nan
    fused: int = 0
    convolutions: int = 0
    left: str = ""
    note: str = ""

    @property
    def family(self) -> str:
        return ENTRIES[self.workload.model].family

    @property
    def ratio(self) -> float:
        return self.stock_ms / self.ours_ms

    @property
    def same_ratio(self) -> float:
        return self.same_ms / self.ours_ms

    @property
    def compiled_ratio(self) -> float:
        return self.compiled_ms / self.ours_ms

    @classmethod
    def of(cls, comparison: Comparison) -> ZooRow:
        by_name = {result.variant: result for result in comparison.results}
        ours, compiled = by_name[variants.OURS], by_name.get(variants.COMPILE, Result(variants.COMPILE))
        formats = [by_name[name] for name in (variants.EAGER, variants.CHANNELS_LAST)]
        stock = min(formats, key=lambda result: (not result.calls, result.median))
        row = cls(comparison.workload, stock.variant if stock.calls else "", stock.median, ours.median, compiled.median)
        row.spread = max(stock.spread, ours.spread)
        same = by_name[variants.EAGER]
        row.same_ms, row.error, row.stock_error = same.median, ours.error, max(result.error for result in formats)
        row.note = "; ".join(f"{result.variant}: {result.note}" for result in comparison.results if result.note)
        report = comparison.report
        if report is not None:
            row.fused, row.convolutions = report.fused, len(report.rows)
            reason, count = next(iter(report.left.most_common(1)), ("", 0))
            row.left = f"{reason} ({count})" if count else report.no_faster
        return row

    def to_json(self) -> dict[str, object]:
        more = {
            "family": self.family,
            "ratio": self.ratio,
            "same_ratio": self.same_ratio,
            "compiled_ratio": self.compiled_ratio,
        }
        return {**asdict(self), **more}

    def cells(self) -> list[str]:
        """What the tables show, in the order of COLUMNS."""
        return [
            self.workload.model,
            self.family,
            str(self.workload.batch),
            f"{self.fused} of {self.convolutions}" if self.convolutions else "–",
            _milliseconds(self.stock_ms),
            self.stock.removeprefix("stock ") or "–",
            _milliseconds(self.compiled_ms),
            _milliseconds(self.ours_ms),
            _cell(self.ratio, "{:.2f}"),
            _cell(self.same_ratio, "{:.2f}"),
            _cell(self.compiled_ratio, "{:.2f}"),
            _cell(self.spread, "{:.0%}"),
            f"{_cell(self.error, '{:.1e}')}, {_cell(self.stock_error, '{:.1e}')}",
            self.left,
            self.note,
        ]


COLUMNS = (
    *("model", "family", "batch", "convolutions fused", "stock, ms", "stock's format", "compiled, ms", "ours, ms"),
    *(
        "stock / ours",
        "in one format",
        "compiled / ours",
        "± IQR",
        "error vs float64: ours, stock",
        "not fused, mostly since",
        "note",
    ),
)
_TEXTS = {"model", "family", "stock's format", "not fused, mostly since", "note"}
_COMPILED = {"compiled, ms", "compiled / ours"}


def run(
    workload: Workload, names: list[str], seconds: float, step: Callable[[str, float], None] = lambda text, share: None
) -> ZooRow:
    """Measures a model by these variants. Whatever goes wrong becomes the row's note."""
    try:
        return ZooRow.of(inference.compare(workload, names, seconds, step))
    except Exception as error:  # of a model that can't be made, of its forward, of memory: the other models are measured
        text = " ".join(str(error).split())
        return ZooRow(workload, note=f"{type(error).__name__}: {text[:200]}")
    finally:
        gc.collect()  # modules and fast paths refer to each other


def line(row: ZooRow) -> str:
    """A row in a line, for a log."""
    ours = f"stock {_milliseconds(row.stock_ms)} ms, ours {_milliseconds(row.ours_ms)}, {_cell(row.ratio, '{:.2f}×')}"
    fused = f"{row.fused} of {row.convolutions} fused"
    return "; ".join(text for text in (f"{row.workload}: {ours}", fused, row.left, row.note) if text)


def means(rows: list[ZooRow]) -> list[tuple[str, int, float, float]]:
    """Geometric means of the rows that have a ratio: what they are over, how many rows, stock / ours, compiled / ours."""
    timed = [row for row in rows if not math.isnan(row.ratio)]
    groups: dict[str, list[ZooRow]] = {}
    for batch in sorted({row.workload.batch for row in timed}):
        for dtype in sorted({row.workload.dtype for row in timed}):
            own = [row for row in timed if (row.workload.batch, row.workload.dtype) == (batch, dtype)]
            groups[f"all models, batch {batch}, {dtype}"] = own
            groups[f"residual families, batch {batch}, {dtype}"] = [r for r in own if ENTRIES[r.workload.model].residual]
    return [
        (name, len(own), _geometric(r.ratio for r in own), _geometric(r.compiled_ratio for r in own))
        for name, own in groups.items()
        if own
    ]


def _geometric(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios if not math.isnan(ratio)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summary(rows: list[ZooRow]) -> list[str]:
    """What the table comes to, a sentence a line: means, models that are slower, models without a ratio."""
    found = []
    for name, count, stock, compiled in means(rows):
        more = "" if math.isnan(compiled) else f", of torch.compile's {compiled:.2f}"
        found.append(f"Geometric mean over {name} ({count}): stock's time over ours {stock:.2f}{more}.")
    slower = sorted((row.ratio, f"{row.workload.model} (batch {row.workload.batch})") for row in rows if row.ratio < 1)
    found.append(f"Slower than stock: {_listed(slower)}.")
    same = sorted((row.same_ratio, f"{row.workload.model} (batch {row.workload.batch})") for row in rows if row.same_ratio < 1)
    found.append(f"Slower than stock in the same memory format: {_listed(same)}.")
    failed = ", ".join(f"{row.workload.model} (batch {row.workload.batch})" for row in rows if math.isnan(row.ratio))
    return [*found, f"Without a ratio: {failed}."] if failed else found


def _listed(slower: list[tuple[float, str]]) -> str:
    return ", ".join(f"{name} {ratio:.2f}" for ratio, name in slower) or "none"


def _shown(rows: list[ZooRow]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and cells; columns that would be empty, torch.compile's and the notes, are left out."""
    compiled = any(not math.isnan(row.compiled_ms) for row in rows)
    noted = any(row.note for row in rows)
    own = [name for name in COLUMNS if (compiled or name not in _COMPILED) and (noted or name != COLUMNS[-1])]
    return own, [[cell for name, cell in zip(COLUMNS, row.cells(), strict=True) if name in own] for row in rows]


def print_table(console: Console, rows: list[ZooRow], machine: dict[str, object]) -> None:
    """The rows and what they come to."""
    if not console.is_terminal:
        console = Console(width=220)
    table = Table(title="Zoo", title_justify="left", header_style="bold")
    names, cells = _shown(rows)
    for name in names:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    for row, shown in zip(rows, cells, strict=True):
        table.add_row(*shown, style="bold" if row.note or row.ratio < 1 else None)
    console.print(_heading(machine), highlight=False)
    console.print(table)
    for text in summary(rows):
        console.print(text, highlight=False)


def save(out: Path, rows: list[ZooRow], machine: dict[str, object]) -> list[Path]:
    """Writes JSON and Markdown, whose table can be pasted into a page, to `out` with their suffixes; returns their paths."""
    content = {"machine": machine, "rows": [row.to_json() for row in rows]}
    data, page = (out.parent / f"{out.name}.{suffix}" for suffix in ("json", "md"))
    data.write_text(json.dumps(content, indent=2) + "\n")
    page.write_text(
        "\n\n".join((_heading(machine), markdown(*_shown(rows)), "\n".join(f"- {s}" for s in summary(rows)))) + "\n"
    )
    return [data, page]


def _heading(machine: dict[str, object]) -> str:
    return f"{inference.describe(machine)}, PyTorch {machine['torch']}; medians of interleaved runs, milliseconds a batch"


def _milliseconds(value: float) -> str:
    return _cell(value, "{:.1f}" if value >= 10 else "{:.2f}")


def _cell(value: float, format: str) -> str:
    return "–" if math.isnan(value) else format.format(value)
