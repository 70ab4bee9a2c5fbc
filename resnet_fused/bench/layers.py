"""Layer by layer: what each backend makes of a model's convolutions, blocks and stem, as a share of the CPU's peak.

GFLOP/s are effective: the operations of the direct sum, divided by the time. Winograd does fewer operations, so that its share
of the peak may be above 100%.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resnet_fused.backends import BackendError, available_backends
from resnet_fused.backends.binding import bind
from resnet_fused.backends.problem import Folded, Problem
from resnet_fused.bench.timing import interleave
from resnet_fused.bench.workloads import Workload
from resnet_fused.fuse import fuse
from resnet_fused.fusion.rows import path_of


@dataclass(frozen=True)
class LayerResult:
    """Times of one kind of layer.

    Attributes:
        problem: the layer.
        count: how often the model has it.
        chosen: the backend that the automatic choice takes, "a+b" for a block whose layers go to different ones.
        milliseconds: median time of that choice ("auto"), and of each backend that can serve the layer.
    """

    problem: Problem
    count: int
    chosen: str
    milliseconds: dict[str, float]

    @property
    def gflops(self) -> float:
        """Effective GFLOP/s of the automatic choice."""
        return operations(self.problem) / self.milliseconds["auto"] * 1e-6


def operations(problem: Problem) -> int:
    """Floating-point operations of the direct sum, a multiply-add counting as two."""
    n, _, height, width = problem.shape
    total, (h, w) = 0, (height, width)
    for i, conv in enumerate(problem.convs):
        if problem.shortcut and i == len(problem.convs) - 1:
            h, w = height, width
        h, w = conv.output_size(h, w)
        total += 2 * n * h * w * conv.out_channels * conv.in_channels // conv.groups * conv.kernel[0] * conv.kernel[1]
    return total


def measure_peak(dtype: torch.dtype) -> float | None:
    """The CPU's multiply-add peak for the dtype on PyTorch's threads, GFLOP/s; None where it can't be measured."""
    if "cpu" not in available_backends():
        return None
    ops = torch.ops.resnet_fused_cpu
    pairs = dtype == torch.bfloat16 and ops.avx512_bf16()
    return ops.measure_peak(pairs)


@torch.no_grad()
def problems(workload: Workload) -> Counter[Problem]:
    """The fused model's distinct problems, and how often each occurs."""
    model, x = workload.make()
    model = fuse(model.to(memory_format=torch.channels_last))
    model(x.contiguous(memory_format=torch.channels_last))
    found: Counter[Problem] = Counter()
    for module in model.modules():
        path = path_of(module)
        for run in path.runs() if path is not None else ():
            found.update(problem for problem, _ in run.problems.values())
    return found


def run_layers(workload: Workload, seconds: float = 0.5) -> Iterator[LayerResult]:
    """Times every kind of layer of a workload on every backend that serves it, interleaved, `seconds` each."""
    for problem, count in problems(workload).items():
        yield _run_layer(problem, count, seconds)


@torch.no_grad()
def _run_layer(problem: Problem, count: int, seconds: float) -> LayerResult:
    weights = []
    for conv in problem.convs:
        fan_in = conv.in_channels // conv.groups * conv.kernel[0] * conv.kernel[1]
        weight = _random((conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)) * (2 / fan_in) ** 0.5
        weights.append(weight.to(problem.dtype))
    folded = Folded(tuple(weights), tuple(w.new_zeros(w.shape[0]) for w in weights))
    x = _activations(problem, problem.shape)
    residual = _activations(problem, problem.output_shape()) if problem.op == "conv2d_bn_add_relu" else None
    automatic = bind(problem, folded, "auto")
    calls = {"auto": partial(automatic.kernel, x, residual)}
    for backend in available_backends():
        try:
            calls[backend] = partial(bind(problem, folded, backend).kernel, x, residual)
        except BackendError:
            continue
    samples = {name: s for _, every in interleave(calls, seconds) for name, s in every.items()}
    return LayerResult(problem, count, automatic.backend, {name: s.median for name, s in samples.items()})


def _activations(problem: Problem, shape: tuple[int, int, int, int]) -> Tensor:
    return _random(shape).to(problem.dtype).contiguous(memory_format=torch.channels_last)


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def print_layers(console: Console, workload: Workload, results: list[LayerResult], peak: float | None) -> None:
    """A row for each kind of layer: the automatic choice's effective GFLOP/s and share of the peak, and every time."""
    if not console.is_terminal:
        console = Console(width=160)
    threads = torch.get_num_threads()
    measured = f"multiply-add peak {peak:.0f} GFLOP/s" if peak else "peak not measured"
    console.print(f"{workload}; {threads} threads, {measured}; GFLOP/s count the direct sum", highlight=False)
    table = Table(header_style="bold")
    backends = sorted({name for result in results for name in result.milliseconds})
    for name in ("layer", "input", "×", "chosen", "GFLOP/s", "of peak", *(f"{b}, ms" for b in backends)):
        table.add_column(name, justify="left" if name in ("layer", "input", "chosen") else "right", no_wrap=True)
    for result in results:
        fastest = min(result.milliseconds, key=result.milliseconds.__getitem__)
        table.add_row(
            describe(result.problem),
            "×".join(map(str, result.problem.shape)),
            str(result.count),
            result.chosen,
            f"{result.gflops:.0f}",
            f"{result.gflops / peak:.0%}" if peak else "–",
            *(
                f"[bold]{ms:.2f}[/bold]" if name == fastest else f"{ms:.2f}"
                for name, ms in ((b, result.milliseconds.get(b, float("nan"))) for b in backends)
            ),
        )
    console.print(table)


def describe(problem: Problem) -> str:
    """The layer in few words, such as "conv2d_bn_relu(64 3×3/2)"."""
    convs = ", ".join(
        f"{c.out_channels} {c.kernel[0]}×{c.kernel[1]}" + (f"/{c.stride[0]}" if c.stride != (1, 1) else "")
        for c in problem.convs
    )
    return f"{problem.op}({convs})"
