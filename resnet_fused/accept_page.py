"""The page of `resnet-fused accept`: what is right, what is fast, and what isn't, from what the steps wrote."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused import env_report
from resnet_fused.text import markdown

# What verify writes into the page's folder, and what bench writes into folders of its own.
VERIFIED = "verify.json"
RESULTS = ("inference_*.json", "inference_*.png", "layers_*.json", "training_*.json")

_OURS = "resnet_fused"
# Layers that are shown: those by which most time could be gained.
_SLOWEST = 12


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        title: what it answers.
        arguments: of `resnet-fused`.
        share: of the whole time that it may take at most.
    """

    title: str
    arguments: tuple[str, ...]
    share: float = 1.0

    @property
    def log(self) -> str:
        """Name of the file that its output goes to."""
        return self.title.lower().replace(" ", "-").replace(",", "") + ".txt"

    @property
    def folder(self) -> str:
        """Where it writes its results, in the folder of the page."""
        written = self.arguments[self.arguments.index("--out") + 1] if "--out" in self.arguments else ""
        return "" if written.endswith(".json") else written

    def __str__(self) -> str:
        return shlex.join(("resnet-fused", *self.arguments))


@dataclass
class Outcome:
    """What came of a step: how long it took, and why it didn't end well, or nothing."""

    step: Step
    seconds: float
    fault: str = ""


@dataclass
class Record:
    """All that is known so far; the page shows it.

    Attributes:
        device, minutes: as given.
        outcomes: of the steps that ran or were left out.
    """

    device: str
    minutes: float
    outcomes: list[Outcome] = field(default_factory=list)


def page(record: Record, out: Path) -> str:
    """The whole page, as Markdown."""
    parts = [
        f"# resnet_fused on {_name(record, out)}",
        f"`resnet-fused accept --device {record.device} --minutes {record.minutes:g}`, "
        f"{sum(o.seconds for o in record.outcomes):.0f} s. Times were measured here; bounds are counted and no measurements.",
        summary(record, out),
        "## Is it right?",
        *_right(out),
        "## Is it fast?",
        *_fast(record, out),
        "## Where is time left?",
        *_layers(record, out),
        "## Training",
        *_training(record, out),
        "## Steps",
        _steps(record),
        "## Machine",
        markdown(("", ""), (*env_report.machine(), *env_report.versions())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(record: Record, out: Path) -> str:
    """What is right, what is fast, and what isn't, in a few lines."""
    lines = []
    verified = _read(out / VERIFIED)
    if verified is None:
        lines.append("Right: not known, since the kernels were not verified.")
    else:
        failed = wrong_kernels(out)
        text = f"Right: {len(verified['checks'])} checks of kernels against float64, {len(failed)} failed."
        left = len(verified["unavailable"])
        lines.append(text + (f" Not verified: {left} (below)." if left else ""))
    ratios = {name: _best_of_others(comparison) for name, comparison in _comparisons(record, out)}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not known:
        lines.append("Fast: not known, since no model was timed.")
    else:
        faster = {name: ratio for name, ratio in known.items() if ratio >= 1.0}
        best = f" ({min(known.values()):.2f} to {max(known.values()):.2f} times as fast)"
        lines.append(f"Fast: faster than every other way that was measured in {len(faster)} of {len(known)} workloads{best}.")
        slower = [f"{name} ({ratio:.2f})" for name, ratio in known.items() if ratio < 1.0]
        if slower:
            lines.append(f"Not the fastest: {', '.join(slower)}.")
    untimed = [name for name, ratio in ratios.items() if ratio is None]
    if untimed:
        lines.append(f"Without a time for ours: {', '.join(untimed)}.")
    undone = [f"{o.step.title.lower()} ({o.fault})" for o in record.outcomes if o.fault]
    if undone:
        lines.append(f"Not done, or not to its end: {'; '.join(undone)}.")
    return "\n".join(f"- {line}" for line in lines)


def wrong_kernels(out: Path) -> list[dict[str, Any]]:
    """The checks that failed."""
    verified = _read(out / VERIFIED)
    return [] if verified is None else [check for check in verified["checks"] if not check["passed"]]


def _name(record: Record, out: Path) -> str:
    for _, content in _saved(record, out, "inference_*.json"):
        return str(content["machine"].get("gpu") or content["machine"]["processor"])
    return record.device


def _right(out: Path) -> Iterator[str]:
    verified = _read(out / VERIFIED)
    if verified is None:
        yield "Not verified."
        return
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in verified["checks"]:
        groups.setdefault((check["backend"], check["dtype"]), []).append(check)
    rows = []
    for (backend, dtype), checks in groups.items():
        kernels = len({check["kernel"] for check in checks})
        failed = sum(not check["passed"] for check in checks)
        rows.append((backend, dtype, str(kernels), str(len(checks)), str(failed) if failed == 0 else f"**{failed}**"))
    yield markdown(("backend", "dtype", "kernels", "checks", "failed"), rows)
    wrong = wrong_kernels(out)
    if wrong:
        columns = ("backend", "kernel", "problem", "reason", "fallback")
        header = ("failed: backend", "kernel", "problem", "reason", "used instead")
        yield markdown(header, [[str(check[column]) for column in columns] for check in wrong])
    reasons: dict[str, list[str]] = {}
    for what, why in verified["unavailable"].items():
        reasons.setdefault(why, []).append(what)
    if reasons:
        found = [(what[0] + (f", and {len(what) - 1} more" if len(what) > 1 else ""), why) for why, what in reasons.items()]
        yield markdown(("not verified", "because"), found)


def _fast(record: Record, out: Path) -> Iterator[str]:
    found = False
    for path, content in _saved(record, out, "inference_*.json"):
        found = True
        yield f"### {next(o.step.title for o in record.outcomes if o.step.folder == path.parent.name)}"
        gpu = "gpu" in content["machine"]
        header = ["workload", "variant", "ms", "± IQR", *(["GPU ms", "bound / GPU ms"] if gpu else []), "images/s"]
        rows = []
        for comparison in content["comparisons"]:
            for i, result in enumerate(comparison["results"]):
                mark = "**" if result["variant"] == _OURS else ""
                bound = comparison["bound"] or math.nan
                on_gpu = [_number(result["gpu"], "{:.3f}"), _number(bound / result["gpu"], "{:.0%}")] if gpu else []
                cells = (
                    *(result["variant"], _number(result["median"], "{:.2f}"), _number(result["spread"], "{:.0%}"), *on_gpu),
                    *(_number(result["images_per_second"], "{:.0f}"), _number(result["time_over_ours"], "{:.2f}")),
                    *(_number(result["error"], "{:.1e}"), _number(result["first_call"], "{:.2f}"), result["note"]),
                )
                rows.append((_workload(comparison) if i == 0 else "", *(f"{mark}{c}{mark}" if c else "" for c in cells)))
        yield markdown((*header, "time / ours", "error vs float64", "first call, s", "note"), rows)
        chart = path.with_suffix(".png")
        if chart.exists():
            yield f"![Speed relative to stock eager]({chart.relative_to(out)})"
    if not found:
        yield "No model was timed."


def _layers(record: Record, out: Path) -> Iterator[str]:
    rows: list[tuple[float, list[str]]] = []
    for _, content in _saved(record, out, "layers_*.json"):
        for workload in content["comparisons"]:
            for layer in workload["layers"]:
                ms = layer["milliseconds"]["auto"]
                if layer["bound"] is None:
                    continue
                left = layer["count"] * (ms - layer["bound"])
                others = ", ".join(f"{name} {own:.3f}" for name, own in layer["milliseconds"].items() if name != "auto")
                shape = "×".join(map(str, layer["input"]))
                cells = [layer["layer"], shape, str(layer["count"]), layer["chosen"], f"{ms:.3f}", f"{layer['bound'] / ms:.0%}"]
                rows.append((left, [_workload(workload), *cells, f"{left:.3f}", others]))
    if not rows:
        yield "No layer was timed."
        return
    yield (
        "The layers that lose most against their bound: max(operations / peak, bytes / bandwidth), with each tensor read and "
        "written once. Winograd may beat it."
    )
    rows.sort(key=lambda row: row[0], reverse=True)
    header = ("workload", "layer", "input", "×", "chosen", "ms", "of bound", "ms above it, all", "backends, ms")
    yield markdown(header, [cells for _, cells in rows[:_SLOWEST]])


def _training(record: Record, out: Path) -> Iterator[str]:
    rows = []
    for _, content in _saved(record, out, "training_*.json"):
        for comparison in content["comparisons"]:
            for i, result in enumerate(comparison["results"]):
                peak = f"{result['peak_bytes'] / 2**20:.0f}" if result["peak_bytes"] else "–"
                numbers = _number(result["median"], "{:.1f}"), _number(result["time_over_ours"], "{:.2f}"), peak
                dtype = "bfloat16 autocast" if comparison["workload"]["autocast"] else "float32"
                name = f"{comparison['workload']['model']}, batch {comparison['workload']['batch']}, {dtype}"
                rows.append((name if i == 0 else "", result["variant"], *numbers, result["note"]))
    yield markdown(("step", "variant", "ms", "time / ours", "peak MiB", "note"), rows) if rows else "No step was timed."


def _steps(record: Record) -> str:
    rows = [(o.step.title, f"`{o.step}`", f"{o.seconds:.0f}", f"[output]({o.step.log})", o.fault) for o in record.outcomes]
    return markdown(("step", "command", "s", "", "not done"), rows)


def _comparisons(record: Record, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, content in _saved(record, out, "inference_*.json"):
        for comparison in content["comparisons"]:
            yield _workload(comparison), comparison


def _best_of_others(comparison: dict[str, Any]) -> float | None:
    """The fastest other variant's time over ours; None without a time of ours."""
    results = comparison["results"]
    if not any(result["variant"] == _OURS and result["calls"] for result in results):
        return None
    return min((r["time_over_ours"] for r in results if not r["variant"].startswith(_OURS) and r["calls"]), default=None)


def _saved(record: Record, out: Path, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the steps saved under such names, with its paths."""
    for folder in filter(None, (outcome.step.folder for outcome in record.outcomes)):
        for path in sorted((out / folder).glob(pattern)):
            content = _read(path)
            if content is not None:
                yield path, content


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where it isn't there, or where its step was stopped while it was written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _workload(comparison: dict[str, Any]) -> str:
    workload = comparison["workload"]
    return f"{workload['model']}, batch {workload['batch']}, {workload['dtype']}"


def _number(value: float, format: str) -> str:
    return "–" if math.isnan(value) else format.format(value)
