"""resnet-fused: info, bench, verify, tune, roofline, accept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resnet_fused import backends, config
from resnet_fused.bench import options

_MODELS = "torchvision models, separated by commas (%(default)s)"
_SIZE = "pixels: SIZE or HEIGHTxWIDTH (%(default)s)"
_DTYPES = f"{', '.join(options.DTYPES)}, separated by commas"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        _check_environment()
        return arguments.run(arguments)
    except (options.UserError, backends.BackendError) as error:
        print(f"resnet-fused: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nresnet-fused: interrupted", file=sys.stderr)
        return 130


def _check_environment() -> None:
    """Raises UserError where an environment variable has no such value, before anything is measured."""
    try:
        config.logger()
        backends.choice()
    except ValueError as error:
        raise options.UserError(str(error)) from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resnet-fused",
        description="Fused kernels that make ResNets faster in PyTorch without changing what they compute.",
        epilog="Start with `resnet-fused bench --quick`: what one line, rf.fuse(model), gains on this machine.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    about = "versions, machine, backends and why one is missing: what a bug report needs"
    info = commands.add_parser("info", help=about, description=about[0].upper() + about[1:] + ".")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="compare rf.fuse with stock PyTorch and torch.compile on this machine",
        description="Times whole models, interleaved, and shows each variant's error against float64 beside its time.",
        epilog="Example: resnet-fused bench --models resnet34 --batches 1,16 --dtypes float32 --peers onnxruntime,openvino; "
        "is it never slower: resnet-fused bench --zoo, or a part: bench --zoo --models 'vgg,*regnet*' --batches 1 --seconds 2",
    )
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    verify = commands.add_parser(
        "verify",
        help="compare a fused model with its original against float64, or check every kernel of a device",
        description="Compares fused models with their originals, block by block; with --device, runs every kernel on its own.",
        epilog="On a new machine with a GPU: resnet-fused verify --device cuda. Kernels that fail are not used again.",
    )
    verify.add_argument(
        "--device", help="check every kernel of every backend on this device instead of models: cuda, cuda:1 or cpu"
    )
    verify.add_argument("--out", type=Path, default=Path("verify-results.json"), help="JSON of --device (%(default)s)")
    verify.add_argument("--minutes", type=float, help="that --device may take on a GPU; the rest is not verified (no limit)")
    verify.add_argument("--models", default="resnet18,resnet50", help=_MODELS)
    verify.add_argument("--dtype", default="float32", choices=options.DTYPES, help="of weights and images (%(default)s)")
    verify.add_argument("--size", default="224", help=_SIZE)
    verify.add_argument("--backend", default="auto", help=f"for all ops: auto, {', '.join(backends.names())} (%(default)s)")
    verify.set_defaults(run=_verify)

    tune = commands.add_parser(
        "tune",
        help="measure which backend is the fastest for every layer of a model, and keep it for the automatic choice",
        description="Every candidate is checked against float64 before it is timed. Nothing else should run meanwhile. What is "
        "found holds for this machine and these shapes, and every process uses it from then on; RESNET_FUSED_CACHE_DIR is the "
        "folder that keeps it.",
        epilog="Example: resnet-fused tune --models resnet50 --batches 1,8 --dtypes bfloat16. "
        "For a model of your own: rf.tune(model, example_inputs).",
    )
    _add_workloads(tune)
    tune.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    tune.set_defaults(run=_tune)

    roofline = commands.add_parser(
        "roofline",
        help="bytes and operations of every layer before and after fusion, and the bound that they set on its time",
        description="Counts, for each kind of layer that rf.fuse fuses, the convolutions' operations and the bytes that must "
        "move if every op reads and writes its tensors once: op by op as stock, with each convolution fused, and with the "
        "whole layer fused. From the machine's peak and memory bandwidth follows a bound on the time. Nothing but these "
        "two figures is measured, and a bound is no speed.",
        epilog="For a GPU that isn't at hand, by its data sheet: "
        "resnet-fused roofline --dtypes float16 --batches 64 --peak 312000 --bandwidth 2000",
    )
    _add_roofline_arguments(roofline)
    roofline.set_defaults(run=_roofline)

    accept = commands.add_parser(
        "accept",
        help="on a new machine: is it right, is it fast, where is time left? One page, within so many minutes",
        description="Runs verify and bench on a device, the most important first, each in a process of its own, and writes one "
        "page (report.md) with tables and charts. What takes too long is stopped; what it measured until then counts. Nothing "
        "else should run meanwhile.",
        epilog="Example: resnet-fused accept --device cuda --minutes 8 --out h100",
    )
    accept.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    accept.add_argument("--minutes", type=float, default=8.0, help="for everything (%(default)s)")
    accept.add_argument("--out", type=Path, default=Path("accept-results"), help="folder for the page (%(default)s)")
    accept.set_defaults(run=_accept)
    return parser


def _add_workloads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", default="resnet50", help=_MODELS)
    command.add_argument("--batches", default="1", help="batch sizes, separated by commas (%(default)s)")
    command.add_argument("--dtypes", default="float32", help=f"{_DTYPES} (%(default)s)")
    command.add_argument("--size", default="224", help=_SIZE)


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    # Without a default, so that the command knows what was given: --quick and --training have their own.
    bench.add_argument(
        "--models", help="torchvision models, separated by commas (resnet18,resnet50; training: resnet50; zoo: all)"
    )
    bench.add_argument(
        "--batches", help="batch sizes, separated by commas (1,8, zoo too; training: 16; GPU: 1,32,256; training: 128)"
    )
    bench.add_argument(
        "--dtypes", help=f"{_DTYPES} (float32,bfloat16; zoo: float32; GPU: float16,bfloat16; there float32 may be in TF32)"
    )
    bench.add_argument("--size", help="pixels: SIZE or HEIGHTxWIDTH (224; training: 160, on a GPU 224)")
    bench.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s); on a GPU calls are timed in groups, without waiting"
    )
    bench.add_argument(
        "--peers", default="", help="other engines, separated by commas: onnxruntime, openvino; on a GPU max-autotune, tensorrt"
    )
    bench.add_argument(
        "--layers", action="store_true", help="time every kind of layer by every backend, as a share of what is possible"
    )
    bench.add_argument(
        "--zoo",
        action="store_true",
        help="is it never slower? A list of timm's and torchvision's models, each against the faster of stock's two memory "
        "formats, with how much was fused and why not more; --models takes names, families and patterns of the list",
    )
    bench.add_argument("--training", action="store_true", help="time training steps, with peak memory, instead of inference")
    bench.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile with freezing too, which takes most of the time (yes; --quick and --zoo: no)",
    )
    bench.add_argument(
        "--quick", action="store_true", help="under a minute: without torch.compile, and if not given, ResNet-18 in float32"
    )
    bench.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="of timing for each workload: a model at a batch size; with --training four times as many (%(default)s)",
    )
    bench.add_argument(
        "--minutes",
        type=float,
        help="for all workloads together; what doesn't fit is left out, and the table says so (no limit)",
    )
    bench.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results"),
        help="folder for JSON and PNG, of the zoo JSON and Markdown (%(default)s)",
    )


def _add_roofline_arguments(roofline: argparse.ArgumentParser) -> None:
    _add_workloads(roofline)
    roofline.add_argument("--device", default="cpu", help="whose peak and bandwidth: cpu, cuda or cuda:N (%(default)s)")
    roofline.add_argument("--peak", type=float, help="arithmetic peak, GFLOP/s (measured)")
    roofline.add_argument("--bandwidth", type=float, help="memory bandwidth, GB/s (measured)")
    roofline.add_argument("--threads", type=int, help="CPU threads to measure with (PyTorch's default)")
    roofline.add_argument(
        "--scaling",
        metavar="N,N,…",
        help="show instead how each layer's work divides among these numbers of CPU threads, which may be more than there are "
        "cores, such as 1,2,4,8,16,32,64",
    )
    roofline.add_argument("--plot", type=Path, help="PNG to draw the roofline into, a point for each layer before and after")


def _info(arguments: argparse.Namespace) -> int:
    from resnet_fused import env_report

    print(env_report.text())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    options.need("bench", "rich", "matplotlib", "torchvision")
    from resnet_fused.bench import command

    return command.run(arguments)


def _roofline(arguments: argparse.Namespace) -> int:
    options.need("roofline", "rich", "torchvision", *(("matplotlib",) if arguments.plot else ()))
    from resnet_fused.bench import roofline

    return roofline.run(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    import resnet_fused as rf
    from resnet_fused.bench.workloads import Workload

    device = options.usable_device(arguments.device)
    dtypes = options.names("--dtypes", arguments.dtypes, options.DTYPES)
    batches = options.integers("--batches", arguments.batches)
    size = options.size(arguments.size)
    for name in options.models(arguments.models):
        for dtype in dtypes:
            for batch in batches:
                workload = Workload(name, batch, dtype, size)
                model, x = workload.make()
                fused = rf.fuse(model.to(device), inplace=True)
                print(f"{workload}\n{rf.tune(fused, x.to(device))}\n")
    return 0


def _accept(arguments: argparse.Namespace) -> int:
    options.need("accept", "rich", "matplotlib", "torchvision")
    from resnet_fused import accept

    device = options.usable_device(arguments.device)
    options.positive("--minutes", arguments.minutes)
    return accept.main(device, arguments.minutes, options.folder("--out", arguments.out))


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.device is not None:
        from resnet_fused.verification import device as verify_device

        device = options.device(arguments.device)
        options.folder("--out", arguments.out.parent)
        if arguments.minutes is not None:
            options.positive("--minutes", arguments.minutes)
        return verify_device.main(device, arguments.out, arguments.minutes)
    import resnet_fused as rf
    from resnet_fused.bench.workloads import Workload

    passed = True
    for name in options.models(arguments.models):
        model, x = Workload(name, 2, arguments.dtype, options.size(arguments.size)).make()
        try:
            result = rf.verify(model, rf.fuse(model, backend=arguments.backend), x)
        except ValueError as error:
            raise options.UserError(str(error)) from error
        print(f"{name}\n{result}\n")
        passed = passed and result.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
