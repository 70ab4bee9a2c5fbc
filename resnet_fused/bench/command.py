"""`resnet-fused bench`: reads the options, runs the workloads, shows and saves the results."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from resnet_fused.bench import files, inference, layers, options, peaks, report, roofline, training, variants, zoo, zoo_models
from resnet_fused.bench.budget import Budget
from resnet_fused.bench.layers import LayerResult
from resnet_fused.bench.workloads import DTYPES, Workload

Step = Callable[[str, float], None]
# Options that don't go together.
_APART = (("--layers", "--training"), ("--zoo", "--layers"), ("--zoo", "--training"), ("--zoo", "--quick"))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    modes = [f"--{name}" for name in ("zoo", "layers", "training", "quick") if getattr(arguments, name)]
    for one, other in _APART:
        if one in modes and other in modes:
            raise options.UserError(f"{one} and {other} were both given; choose one")
    arguments.device = options.usable_device(arguments.device)
    if arguments.device != "cpu" and arguments.threads:
        raise options.UserError(f"--threads is for the CPU; leave it out with --device {arguments.device}")
    options.set_threads(arguments.threads)
    options.positive("--seconds", arguments.seconds)
    if arguments.minutes is not None:
        options.positive("--minutes", arguments.minutes)
        for other in ("--zoo", "--layers", "--training"):
            if other in modes:
                raise options.UserError(f"--minutes and {other} were both given; --minutes is for whole models. Leave one out")
    if arguments.quick:
        arguments.seconds = min(arguments.seconds, 4.0)
    before = torch.backends.cudnn.benchmark
    # For every variant, so that stock's convolutions have the fastest of cuDNN's engines too.
    torch.backends.cudnn.benchmark = before or arguments.device != "cpu"
    try:
        mode = _training if arguments.training else _zoo if arguments.zoo else _inference
        return mode(arguments)
    finally:
        torch.backends.cudnn.benchmark = before


def _inference(arguments: argparse.Namespace) -> int:
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    models = options.models(arguments.models or ("resnet18" if arguments.quick else "resnet18,resnet50"))
    gpu = arguments.device != "cpu"
    console = Console()
    usual = "float16,bfloat16" if gpu else "float32,bfloat16"
    dtypes = options.names("--dtypes", arguments.dtypes or (usual.split(",")[0] if arguments.quick else usual), tuple(DTYPES))
    if not (gpu or arguments.dtypes):
        dtypes = _native(console, dtypes)
    batches = options.integers("--batches", arguments.batches or ("1,32,256" if gpu else "1,8"))
    known = variants.GPU_PEERS if gpu else variants.PEERS
    peers = [known[name] for name in options.names("--peers", arguments.peers, tuple(known))] if arguments.peers else []
    size = options.size(arguments.size or "224")
    kind = "layers" if arguments.layers else "inference"
    stem = files.stem(kind, models, batches, dtypes, arguments.size or "224", arguments.device)
    out = files.place(options.folder("--out", arguments.out), stem)
    for model in models:
        Workload(model, 1, "float32", size).make()  # a model that this size doesn't fit should be known of now, not in minutes
    workloads = [Workload(m, b, d, size, arguments.device) for m in models for d in dtypes for b in batches]
    limits = _limits(console, workloads) if gpu or arguments.layers else {}
    machine = inference.machine(arguments.device)
    if arguments.layers:
        return _layers(console, workloads, limits, machine, out)
    compiled = [variants.COMPILE, variants.COMPILE_GRAPHS] if gpu else [variants.COMPILE]
    if not _compiles(arguments):
        compiled = []
    names = [variants.EAGER, variants.CHANNELS_LAST, *compiled, *peers, variants.OURS, *([variants.OURS_GRAPH] if gpu else [])]
    comparisons = []
    budget = Budget(len(workloads), end - time.monotonic())
    with _progress(console, len(workloads)) as step_of:
        for i, workload in enumerate(workloads):
            step, limit = step_of(i, str(workload)), limits.get(workload.dtype)
            comparisons.append(inference.compare(workload, names, arguments.seconds, step, limit, budget))
            if not console.is_terminal:
                console.print(inference.line(comparisons[-1]), highlight=False, soft_wrap=True)
            # After each, so that a run that is cut leaves what it has.
            _write(out, machine, [comparison.to_json() for comparison in comparisons])
    report.print_table(console, comparisons, machine)
    console.print(f"Saved {_json(out)}", highlight=False, soft_wrap=True)
    if any(result.calls for comparison in comparisons for result in comparison.results):
        chart = out.parent / f"{out.name}.png"
        report.save_chart(chart, comparisons, machine)
        console.print(f"Saved {chart}", highlight=False, soft_wrap=True)
    return 0


def _native(console: Console, dtypes: list[str]) -> list[str]:
    """The dtypes that this CPU has instructions for; the others are measured where they are asked for."""
    found = []
    for dtype in dtypes:
        reason = peaks.emulated(dtype)
        if reason is None:
            found.append(dtype)
        else:
            console.print(f"{dtype} is left out, since {reason}; --dtypes {dtype} measures it", highlight=False, soft_wrap=True)
    return found


def _limits(console: Console, workloads: list[Workload]) -> dict[str, roofline.Machine]:
    """What the machine can do at most, by dtype."""
    found = {}
    with console.status("measuring the machine's peak and memory bandwidth"):
        for dtype in {workload.dtype for workload in workloads}:
            machine = roofline.Machine.measured(dtype, workloads[0].device)
            if machine is not None:
                found[dtype] = machine
    return found


def _layers(
    console: Console, workloads: list[Workload], limits: dict[str, roofline.Machine], machine: dict[str, object], out: Path
) -> int:
    saved: list[dict[str, object]] = []
    for workload in workloads:
        limit = limits.get(workload.dtype)
        results: list[LayerResult] = []
        rows: list[dict[str, object]] = []
        saved.append({"workload": asdict(workload), "layers": rows})
        with console.status(str(workload)) as status:
            for result in layers.run_layers(workload):
                results.append(result)
                rows.append(result.to_json(limit.bound_of({result.problem: 1}) if limit else None))
                _write(out, machine, saved)
                status.update(f"{workload}: {len(results)} kinds of layers timed")
        if results:
            report.print_layers(console, workload, results, limit)
        else:
            console.print(f"{workload}: rf.fuse found nothing to fuse in it, so there are no layers to time", highlight=False)
    console.print(f"Saved {_json(out)}", highlight=False, soft_wrap=True)
    return 0


def _training(arguments: argparse.Namespace) -> int:
    models = options.names("--models", arguments.models or ("resnet18" if arguments.quick else "resnet50"), training.MODELS)
    dtypes = options.names("--dtypes", arguments.dtypes or "float32,bfloat16", ("float32", "bfloat16"))
    gpu = arguments.device != "cpu"
    batches = options.integers("--batches", arguments.batches or ("128" if gpu else "4" if arguments.quick else "16"))
    height, width = options.size(arguments.size or ("224" if gpu else "160"))
    if height != width:
        raise options.UserError(f"--size is {arguments.size}; training takes square images, such as {height}")
    if arguments.peers:
        raise options.UserError(f"--peers is {arguments.peers!r}; other engines don't train. Leave it out with --training")
    stem = files.stem("training", models, batches, dtypes, str(height), arguments.device)
    out = files.place(options.folder("--out", arguments.out), stem)
    workloads = [
        training.TrainingWorkload(m, b, height, d == "bfloat16", arguments.device)
        for m in models
        for b in batches
        for d in dtypes
    ]
    names = [name for name in training.VARIANTS if name != training.COMPILE or _compiles(arguments)]
    console = Console()
    comparisons, machine = [], inference.machine(arguments.device)
    with _progress(console, len(workloads)) as step_of:
        for i, workload in enumerate(workloads):
            comparisons.append(training.compare(workload, names, 4 * arguments.seconds, step_of(i, str(workload))))
            if not console.is_terminal:
                console.print(training.line(comparisons[-1]), highlight=False, soft_wrap=True)
            _write(out, machine, [comparison.to_json() for comparison in comparisons])
    (console if console.is_terminal else Console(width=160)).print(training.table(comparisons))
    console.print(f"Saved {_json(out)}", highlight=False, soft_wrap=True)
    return 0


def _compiles(arguments: argparse.Namespace) -> bool:
    """Whether torch.compile is measured too."""
    return not (arguments.quick or arguments.zoo) if arguments.compile is None else arguments.compile


def _zoo(arguments: argparse.Namespace) -> int:
    for option, value in (("--size", arguments.size), ("--peers", arguments.peers)):
        if value:
            raise options.UserError(
                f"{option} is {value!r}; the zoo's models have sizes of their own and no peers. Leave it out"
            )
    console, entries = Console(), zoo_models.chosen(arguments.models)
    for package in zoo_models.missing(entries):
        left = [entry for entry in entries if entry.package != package]
        missing = f"{package} is not installed, so {len(entries) - len(left)} of {len(entries)} models are left out"
        if not left:
            raise options.UserError(f"{missing}; pip install {package}")
        console.print(f"{missing}; pip install {package}", highlight=False)
        entries = left
    dtypes = options.names("--dtypes", arguments.dtypes or "float32", tuple(DTYPES))
    batches = options.integers("--batches", arguments.batches or "1,8")
    stem = files.stem("zoo", [entry.name for entry in entries], batches, dtypes, "", arguments.device)
    out = files.place(options.folder("--out", arguments.out), stem)
    workloads = [
        zoo.ZooWorkload(entry.name, b, d, entry.size, arguments.device, entry.channels)
        for d in dtypes
        for b in batches
        for entry in entries
    ]
    names = [variants.EAGER, variants.CHANNELS_LAST, *([variants.COMPILE] if _compiles(arguments) else []), variants.OURS]
    rows, machine, saved = [], inference.machine(arguments.device), []
    with _progress(console, len(workloads)) as step_of:
        for i, workload in enumerate(workloads):
            rows.append(zoo.run(workload, names, arguments.seconds, step_of(i, str(workload))))
            saved = zoo.save(out, rows, machine)
            if not console.is_terminal:
                console.print(zoo.line(rows[-1]), highlight=False, soft_wrap=True)
    zoo.print_table(console, rows, machine)
    for path in saved:
        console.print(f"Saved {path}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, str], Step]]:
    """A progress bar over `total` workloads. Gives, for a workload's number and name, the function that it tells its steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def step_of(number: int, name: str) -> Step:
            return lambda text, share: progress.update(task, completed=number + share, description=f"{name}: {text}")

        yield step_of


def _json(out: Path) -> Path:
    return out.parent / f"{out.name}.json"


def _write(out: Path, machine: dict[str, object], comparisons: list[dict[str, object]]) -> None:
    _json(out).write_text(json.dumps({"machine": machine, "comparisons": comparisons}, indent=2) + "\n")
