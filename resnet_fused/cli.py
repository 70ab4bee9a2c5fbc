"""resnet-fused: info, bench, verify, tune."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except _UserError as error:
        print(f"resnet-fused: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nresnet-fused: interrupted", file=sys.stderr)
        return 130


class _UserError(Exception):
    """Something the user can put right; printed without a traceback."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resnet-fused",
        description="Fused kernels that make ResNets faster in PyTorch without changing what they compute.",
        epilog="Start with `resnet-fused bench --quick`: what one line, rf.fuse(model), gains on this machine.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, machine, backends and why one is missing: what a bug report needs")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="compare rf.fuse with stock PyTorch and torch.compile on this machine",
        description="Times whole models, interleaved, and shows each variant's error against float64 beside its time.",
        epilog="Example: resnet-fused bench --models resnet34 --batches 1,16 --dtypes float32 --peers onnxruntime,openvino",
    )
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    verify = commands.add_parser(
        "verify",
        help="compare a fused model with its original against float64, or check every kernel of a device",
        description="Compares fused models with their originals, block by block; with --device, runs every kernel on its own.",
        epilog="On a new machine with a GPU: resnet-fused verify --device cuda. Kernels that fail are not used again.",
    )
    verify.add_argument("--device", help="check every kernel of every backend on this device: cuda, cuda:1 or cpu")
    verify.add_argument("--out", type=Path, default=Path("verify-results.json"), help="JSON of --device (%(default)s)")
    verify.add_argument("--models", default="resnet18,resnet50", help="torchvision models, separated by commas (%(default)s)")
    verify.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(%(default)s)")
    verify.add_argument("--size", default="224", help="pixels: SIZE or HEIGHTxWIDTH (%(default)s)")
    verify.add_argument("--backend", default="auto", help="backend for all ops (%(default)s)")
    verify.set_defaults(run=_verify)

    tune = commands.add_parser(
        "tune",
        help="measure which backend is the fastest for every layer of a model, and keep it for the automatic choice",
        description="Every candidate is checked against float64 before it is timed. Nothing else should run meanwhile.",
    )
    tune.add_argument("--models", default="resnet50", help="torchvision models, separated by commas (%(default)s)")
    tune.add_argument("--batches", default="1", help="batch sizes, separated by commas (%(default)s)")
    tune.add_argument("--dtypes", default="float32", help="dtypes, separated by commas (%(default)s)")
    tune.add_argument("--size", default="224", help="pixels: SIZE or HEIGHTxWIDTH (%(default)s)")
    tune.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    tune.set_defaults(run=_tune)
    return parser


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--models", default="resnet18,resnet50", help="torchvision models, separated by commas (%(default)s)")
    bench.add_argument("--batches", default="1,8", help="batch sizes, separated by commas (%(default)s)")
    bench.add_argument("--dtypes", default="float32,bfloat16", help="dtypes, separated by commas (%(default)s)")
    bench.add_argument("--size", default="224", help="pixels: SIZE or HEIGHTxWIDTH (%(default)s)")
    bench.add_argument("--peers", default="", help="other engines, separated by commas: onnxruntime, openvino")
    bench.add_argument(
        "--layers", action="store_true", help="time every kind of layer by every backend, as a share of the peak"
    )
    bench.add_argument("--training", action="store_true", help="time training steps, with peak memory, instead of inference")
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    bench.add_argument("--quick", action="store_true", help="under a minute: ResNet-18 in float32, without torch.compile")
    bench.add_argument("--seconds", type=float, default=6.0, help="timing of each workload (%(default)s)")
    bench.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    bench.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for JSON and PNG (%(default)s)")


def _info(arguments: argparse.Namespace) -> int:
    from resnet_fused import env_report

    print(env_report.text())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    for package in ("rich", "matplotlib", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise _UserError(f"bench needs {package}, which is not installed; pip install 'resnet_fused[bench]'")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from resnet_fused.bench import inference, report, variants
    from resnet_fused.bench.workloads import Workload

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise _UserError(f"--threads is {arguments.threads}; it must be at least 1")
        torch.set_num_threads(arguments.threads)
    dtypes = ["float32"] if arguments.quick else _names("--dtypes", arguments.dtypes, ("float32", "bfloat16", "float16"))
    models = ["resnet18"] if arguments.quick else _models(arguments.models)
    peers = _names("--peers", arguments.peers, variants.PEERS)
    if arguments.layers and arguments.training:
        raise _UserError("--layers and --training were both given; choose one")
    batches = [_positive("--batches", part) for part in arguments.batches.split(",")]
    seconds = min(arguments.seconds, 4.0) if arguments.quick else arguments.seconds
    compiled = [] if arguments.quick or arguments.no_compile else [variants.COMPILE]
    names = [variants.EAGER, variants.CHANNELS_LAST, *compiled, *peers, variants.OURS]
    workloads = [Workload(m, b, d, _size(arguments.size)) for m in models for d in dtypes for b in batches]

    console = Console()
    if arguments.layers:
        return _bench_layers(console, workloads)
    if arguments.training:
        return _bench_training(console, arguments)
    comparisons = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(workloads))
        for i, workload in enumerate(workloads):

            def step(text: str, share: float, i: int = i, workload: Workload = workload) -> None:
                progress.update(task, completed=i + share, description=f"{workload}: {text}")

            comparisons.append(inference.compare(workload, names, seconds, step))
    machine = inference.machine()
    report.print_table(console, comparisons, machine)
    inference.save_json(arguments.out / "inference.json", comparisons)
    report.save_chart(arguments.out / "inference.png", comparisons, machine)
    console.print(f"Saved {arguments.out / 'inference.json'} and {arguments.out / 'inference.png'}", highlight=False)
    return 0


def _bench_layers(console: Any, workloads: list[Any]) -> int:
    from resnet_fused.bench import layers
    from resnet_fused.bench.workloads import DTYPES

    peaks = {dtype: layers.measure_peak(DTYPES[dtype]) for dtype in {workload.dtype for workload in workloads}}
    for workload in workloads:
        results = []
        with console.status(str(workload)) as status:
            for result in layers.run_layers(workload):
                results.append(result)
                status.update(f"{workload}: {len(results)} kinds of layers timed")
        layers.print_layers(console, workload, results, peaks[workload.dtype])
    return 0


def _bench_training(console: Any, arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import replace

    from rich.console import Console

    from resnet_fused.bench import inference, training

    names = [name for name in training.VARIANTS if name != training.COMPILE or not (arguments.quick or arguments.no_compile)]
    workloads = [training.TrainingWorkload(), training.TrainingWorkload(autocast=True)]
    if arguments.quick:
        workloads = [replace(workload, model="resnet18", batch=4) for workload in workloads]
    comparisons = []
    for workload in workloads:
        with console.status(str(workload)) as status:

            def step(text: str, share: float, status: Any = status, workload: Any = workload) -> None:
                status.update(f"{workload}: {text}")

            comparisons.append(training.compare(workload, names, 4 * arguments.seconds, step))
    machine = inference.machine()
    (console if console.is_terminal else Console(width=160)).print(training.table(comparisons))
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "comparisons": [comparison.to_json() for comparison in comparisons]}
    (arguments.out / "training.json").write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"Saved {arguments.out / 'training.json'}", highlight=False)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    import resnet_fused as rf
    from resnet_fused.bench.workloads import Workload

    if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        raise _UserError(f"--device is {arguments.device!r}; it takes cpu, cuda, or one GPU as cuda:1")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise _UserError(f"--device is {arguments.device}, and there is no GPU here; --device cpu tunes for the CPU")
    dtypes = _names("--dtypes", arguments.dtypes, ("float32", "bfloat16", "float16"))
    for name in _models(arguments.models):
        for dtype in dtypes:
            for batch in (_positive("--batches", part) for part in arguments.batches.split(",")):
                workload = Workload(name, batch, dtype, _size(arguments.size))
                model, x = workload.make()
                fused = rf.fuse(model.to(arguments.device), inplace=True)
                print(f"{workload}\n{rf.tune(fused, x.to(arguments.device))}\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.device is not None:
        from resnet_fused import acceptance

        if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
            raise _UserError(f"--device is {arguments.device!r}; it takes cpu, cuda, or one GPU as cuda:1")
        return acceptance.main(arguments.device, arguments.out)
    import resnet_fused as rf
    from resnet_fused.bench.workloads import Workload

    passed = True
    for name in _models(arguments.models):
        model, x = Workload(name, 2, arguments.dtype, _size(arguments.size)).make()
        try:
            result = rf.verify(model, rf.fuse(model, backend=arguments.backend), x)
        except (rf.BackendError, ValueError) as error:
            raise _UserError(str(error)) from error
        print(f"{name}\n{result}\n")
        passed = passed and result.passed
    return 0 if passed else 1


def _names(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = [part.strip() for part in given.split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise _UserError(f"{option} has {name!r}; it takes {', '.join(known)}, separated by commas")
    return names


def _models(given: str) -> list[str]:
    if importlib.util.find_spec("torchvision") is None:
        raise _UserError("models come from torchvision, which is not installed; pip install torchvision")
    import torchvision

    return _names("--models", given, tuple(torchvision.models.list_models(module=torchvision.models)))


def _positive(option: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise _UserError(f"{option} has {text!r}; it takes positive integers, separated by commas")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    parts: list[Any] = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isdigit() and int(p) >= 32 for p in parts):
        raise _UserError(f"--size is {text!r}; it takes pixels as SIZE or HEIGHTxWIDTH, at least 32, such as 224 or 256x192")
    return int(parts[0]), int(parts[-1])


if __name__ == "__main__":
    sys.exit(main())
