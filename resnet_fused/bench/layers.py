"""Layer by layer: what each backend makes of a model's convolutions, blocks and stem, beside what the machine can do at most.

GFLOP/s are effective: the operations of the direct sum, divided by the time. Winograd does fewer operations, so that its share
of a CPU's peak may be above 100%. On a GPU the share is of the roofline's bound, which counts the bytes as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from resnet_fused.backends import BackendError, Problem, available_backends, get, gpu_time
from resnet_fused.backends.accuracy import inputs_of, more_inputs_of, parameters_of
from resnet_fused.backends.binding import bind, divided, is_divisible
from resnet_fused.backends.problem import FIRST_RESULT, Conv, Linear
from resnet_fused.bench.timing import interleave
from resnet_fused.bench.workloads import Workload
from resnet_fused.fusion.fuse import fuse
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

    def to_json(self, bound: float | None) -> dict[str, object]:
        return {
            "layer": describe(self.problem),
            "input": self.problem.shape,
            "count": self.count,
            "chosen": self.chosen,
            "bound": bound,
            "milliseconds": self.milliseconds,
        }


def operations(problem: Problem) -> int:
    """Floating-point operations of the direct sum, a multiply-add counting as two."""
    shapes, total = problem.shapes(), 0
    for number, step in enumerate(problem.steps, FIRST_RESULT):
        operation = step.operation
        if isinstance(operation, Conv):
            n, _, h, w = step._replace(epilogue=step.epilogue._replace(pool=None)).result_shape(shapes[step.reads[0]])
            taps = operation.in_channels // operation.groups * operation.kernel[0] * operation.kernel[1]
            total += 2 * n * h * w * operation.out_channels * taps
        elif isinstance(operation, Linear):
            total += 2 * shapes[number][0] * operation.in_features * operation.out_features
    return total


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
    """Times every kind of layer of a workload on every backend that serves it, interleaved, `seconds` each on a CPU.

    On a GPU layers are single convolutions, of which blocks are composed there, and times are the GPU's. Triton's kernels would
    have to be compiled first, and are timed where one of them is chosen.
    """
    gpu = workload.device != "cpu"
    for problem, count in (_convolutions(workload) if gpu else problems(workload)).items():
        yield _run_layer(problem, count, seconds)


def _convolutions(workload: Workload) -> Counter[Problem]:
    found: Counter[Problem] = Counter()
    for problem, count in problems(workload).items():
        own = [part.problem for part in divided(problem, parameters_of(problem))] if is_divisible(problem) else [problem]
        for part in own:
            if part.convs:
                found[part] += count
    return found


@torch.no_grad()
def _run_layer(problem: Problem, count: int, seconds: float) -> LayerResult:
    parameters = parameters_of(problem)
    inputs = *inputs_of(problem), *more_inputs_of(problem)
    automatic = bind(problem, parameters, "auto")
    calls = {"auto": partial(automatic.kernel, *inputs)}
    gpu = problem.device.type == "cuda"
    for backend in available_backends():
        if gpu and not get(backend).ready:
            continue
        try:
            calls[backend] = partial(bind(problem, parameters, backend).kernel, *inputs)
        except BackendError:
            continue
    if gpu:
        with torch.cuda.device(problem.device):
            return LayerResult(problem, count, automatic.backend, gpu_time.medians(calls))
    samples = {name: s for _, every in interleave(calls, seconds) for name, s in every.items()}
    return LayerResult(problem, count, automatic.backend, {name: s.median for name, s in samples.items()})


def _convs(problem: Problem) -> list[Conv]:
    """The problem's convolutions, and its linear layer as one."""
    operations = [step.operation for step in problem.steps]
    found = [Conv(*op, (1, 1)) if isinstance(op, Linear) else op for op in operations]
    return [op for op in found if isinstance(op, Conv)]


def describe(problem: Problem) -> str:
    """The layer in few words, such as "conv2d_bn_relu(64 3×3/2)"."""
    convs = ", ".join(
        f"{c.out_channels} {c.kernel[0]}×{c.kernel[1]}" + (f"/{c.stride[0]}" if c.stride != (1, 1) else "")
        for c in _convs(problem)
    )
    return f"{problem.label}({convs})"
