"""Inference: whole models, by every variant, each checked against float64 before its time is shown."""

from __future__ import annotations

import copy
import functools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import resnet_fused as rf
from resnet_fused.backends import gpu_time, tuning_cache
from resnet_fused.backends.accuracy import judge, relative_error
from resnet_fused.backends.processor import processor
from resnet_fused.bench import roofline, variants
from resnet_fused.bench.budget import Budget
from resnet_fused.bench.roofline import Machine
from resnet_fused.bench.timing import interleave, quantile
from resnet_fused.bench.workloads import Workload

# On a GPU calls are timed in groups of about so many milliseconds, within which nothing waits for it.
_GROUP = 20.0
# How often a GPU's own time is taken.
_GPU_TURNS = 9
# Rounds of timing of every variant, at least, where there is the time for them.
_ROUNDS = 5
# Times of every variant that there are when a run is cut.
_LEAST_TIMES = 2
# Images on which results are compared with float64, which takes many times as long.
_CHECKED = 2
# A result further off than this is wrong, not rounded; no time is shown for it.
_WRONG = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# Convolutions of float32 on a GPU are in TF32, unless it is forbidden.
_WRONG_IN_TF32 = 2e-2


@dataclass
class Result:
    """What was measured of one variant on one workload.

    Attributes:
        median: milliseconds a call.
        spread: distance between the quartiles of the times, relative to the median.
        gpu: milliseconds that a GPU works for a call, without waiting for the host.
        first_call: seconds until the first result, with what the variant prepares, compiles and tries for it.
        error: relative norm of the result's distance from float64.
        note: why there is no time.
    """

    variant: str
    median: float = float("nan")
    spread: float = float("nan")
    gpu: float = float("nan")
    first_call: float = float("nan")
    error: float = float("nan")
    calls: int = 0
    note: str = ""


@dataclass
class Comparison:
    """All variants on one workload. `ratio` is another variant's time to ours: above 1, ours is faster.

    Attributes:
        bound: milliseconds that the convolutions take at least, each with what follows it as one op (bench.roofline).
        moved: bytes that these ops read and write.
        report: what was fused of the model; None where ours didn't run.
    """

    workload: Workload
    results: list[Result] = field(default_factory=list)
    bound: float | None = None
    moved: int = 0
    report: rf.Report | None = None

    def ratio(self, variant: str) -> float:
        by_name = {r.variant: r for r in self.results}
        return by_name[variant].median / by_name[variants.OURS].median

    def images_per_second(self, result: Result) -> float:
        return self.workload.batch / result.median * 1e3

    def to_json(self) -> dict[str, object]:
        results = [
            {**asdict(r), "images_per_second": self.images_per_second(r), "time_over_ours": self.ratio(r.variant)}
            for r in self.results
        ]
        return {"workload": asdict(self.workload), "bound": self.bound, "moved": self.moved, "results": results}


def machine(device: str = "cpu") -> dict[str, object]:
    """What the times were measured on."""
    gpu: dict[str, object] = {}
    if device != "cpu":
        found = tuning_cache.machine(torch.device(device))
        gpu = {"gpu": found["device"], **{name: found[name] for name in ("architecture", "driver", "cudnn", "triton")}}
    return {
        **gpu,
        **processor().to_json(),
        "processor": str(processor()),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def describe(machine: dict[str, object]) -> str:
    """The machine in a line: its GPU, or its processor and threads."""
    return str(machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads")


@torch.no_grad()
def compare(
    workload: Workload,
    names: list[str],
    seconds: float,
    step: Callable[[str, float], None] = lambda text, share: None,
    limits: Machine | None = None,
    budget: Budget | None = None,
) -> Comparison:
    """Runs one workload by the variants of these names.

    Args:
        seconds: of timing, for all variants together.
        limits: of the machine, from which the bound follows; None to leave it out.
        step: is told what happens and which share of the workload is done, for a progress bar.
        budget: the run's time, of which this workload gets its share; None for all the time that it takes.
    """
    budget = budget or Budget(1)
    budget.begin()
    reason = budget.too_slow(workload, len(names))
    if reason is not None:
        return Comparison(workload, [Result(variants.OURS, note=reason)])
    # Once for all variants: what one of them compiled would be lost with another's reset.
    torch._dynamo.reset()
    model, x = workload.make()
    step("first call", 0.0)
    for _ in range(2):  # a first call prepares kernels and memory too: if it is too slow, a second one decides
        start = time.perf_counter()
        by_stock = _by_stock(model, x)
        if not x.is_cuda:  # on a GPU that is the time of the launches
            budget.note_call(workload, len(x[:_CHECKED]), time.perf_counter() - start)
        reason = budget.too_slow(workload, len(names))
        if reason is None:
            break
    if reason is not None:
        return Comparison(workload, [Result(variants.OURS, note=reason)])
    step("float64 reference", 0.0)
    truth, other = _truth(model, x), _in_channels_last(model, x)
    comparison = Comparison(workload)
    if limits is not None:
        problems = roofline.posed(workload)
        comparison.bound, comparison.moved = limits.bound_of(problems), roofline.moved(problems)
    runs: dict[str, variants.Run] = {}
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    for i, name in enumerate(names):
        step(f"preparing {name}", 0.5 * i / len(names))
        result = Result(name)
        comparison.results.append(result)
        made = _made(result, workload, model, x, budget)
        if made is None:
            continue
        run, y = made
        result.error = _error(y, truth)
        if isinstance(run, variants.FusedRun):
            comparison.report = run.report()
        if is_wrong(result, workload, y, by_stock, truth, other):
            continue
        runs[name], counts[name] = run, _group(run) if x.is_cuda else 1
        calls[name] = run if counts[name] == 1 else functools.partial(_repeat, run, counts[name])
    seconds = min(seconds, max(budget.left(), 0.1))
    rounds = budget.rounds(workload, len(calls), _ROUNDS)
    for name, samples in interleave(calls, seconds, rounds, torch.cuda.synchronize if x.is_cuda else None):
        done = sum(sum(s.times) for s in samples.values()) * 2 / 1e3 / seconds
        step(f"timing {name}", 0.5 + 0.5 * min(done, 1.0))
        # Calls may take longer than they seemed to.
        if budget.left() < 0 and all(len(own.times) >= _LEAST_TIMES for own in samples.values()):
            break
    for result in comparison.results:
        if result.variant in calls:
            # A call is not what it was: a model may be a CUDA graph by now.
            y = _checked(runs[result.variant]())
            error = _error(y, truth)
            if not error <= result.error:  # NaN is worse as well
                result.error = error
            if is_wrong(result, workload, y, by_stock, truth, other):
                continue
            own = samples[result.variant]
            result.median, result.spread = own.median / counts[result.variant], own.spread
            result.calls = len(own.times) * counts[result.variant]
            if x.is_cuda:
                step(f"GPU time of {result.variant}", 1.0)
                with torch.cuda.device(x.device):
                    result.gpu = _gpu_time(runs[result.variant], result.median)
    return comparison


def _made(
    result: Result, workload: Workload, model: nn.Module, x: Tensor, budget: Budget
) -> tuple[variants.Run, list[Tensor]] | None:
    """A variant and its first result; None, with the reason as its note, where it can't be made, or not in the time."""
    compiles = result.variant in (variants.COMPILE, variants.COMPILE_GRAPHS)
    allowed, alone = budget.for_compiling() if compiles else math.inf, 0.0
    if allowed is None:
        result.note = "left out: no time to compile"
        return None
    if allowed < math.inf and budget.compiled is None:
        # How long it takes is seen in another process, which can be ended. What it compiled is in a cache for this one.
        seconds = variants.time_to_compile(workload, allowed)
        if seconds is None:
            budget.note_compiled(allowed)
            result.note = f"left out: more than {allowed:.0f} s to compile"
            return None
        alone = seconds
    start = time.perf_counter()
    try:
        run = variants.make(result.variant, model, x)
    except variants.Unavailable as reason:
        result.note = str(reason)
        return None
    finally:
        if compiles:
            budget.note_compiled(max(alone, time.perf_counter() - start))
    y = _checked(run())
    if x.is_cuda:
        torch.cuda.synchronize()
    result.first_call = max(alone, time.perf_counter() - start)
    return run, y


def line(comparison: Comparison) -> str:
    """A workload in a line, for a log: our time, the others' and their ratio to it; why a variant has none."""
    found = []
    for result in sorted(comparison.results, key=lambda result: result.variant != variants.OURS):
        ratio = comparison.ratio(result.variant)
        more = f" ({ratio:.2f}×)" if ratio == ratio and result.variant != variants.OURS else ""
        if result.calls:
            found.append(f"{result.variant} {result.median:.{1 if result.median >= 10 else 2}f} ms{more}")
        elif result.note:
            found.append(f"{result.variant}: {result.note}")
    return f"{comparison.workload}: {', '.join(found)}"


def is_wrong(
    result: Result,
    workload: Workload,
    y: list[Tensor],
    by_stock: list[Tensor],
    truth: list[Tensor],
    other: list[Tensor],
) -> bool:
    """Whether a result isn't what it must be, which the note then says.

    Ours must be as good as stock's in whichever of its two memory formats (`by_stock`, `other`) has the larger error. Others'
    may be further off, but not by more than rounding explains. So may ours in TF32, since stock takes float32 for some
    problems though TF32 is allowed.
    """
    tf32 = workload.dtype == "float32" and workload.device != "cpu"
    ours = result.variant in (variants.OURS, variants.OURS_GRAPH) and not tf32
    fault = next(filter(None, map(_fault, y, by_stock, truth, other)), None) if ours else None
    if fault is None and result.error < (_WRONG_IN_TF32 if tf32 else _WRONG[workload.dtype]):
        return False
    why = fault or f"relative error {result.error:.1e}"
    result.note = f"wrong result ({why}), so no time is shown"
    return True


def _gpu_time(run: variants.Run, wall: float) -> float:
    """Median milliseconds that the GPU works for a call, which takes `wall` milliseconds with what the host does."""
    # The host launches them in less than these times, while the GPU waits.
    count = 2
    return quantile([gpu_time.elapsed(run, count, (count + 1) * wall) / count for _ in range(_GPU_TURNS)], 0.5)


def _group(run: variants.Run) -> int:
    """How many calls are timed in one go on a GPU, after some that a model may take to become a CUDA graph."""
    _repeat(run, 12)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _repeat(run, 3)
    torch.cuda.synchronize()
    once = (time.perf_counter() - start) * 1e3 / 3
    return max(1, min(100, round(_GROUP / once)))


def _repeat(run: variants.Run, count: int) -> None:
    for _ in range(count):
        run()


def _truth(model: nn.Module, x: Tensor) -> list[Tensor]:
    return _checked(copy.deepcopy(model).double()(x[:_CHECKED].double()))


@torch.no_grad()
def _by_stock(model: nn.Module, x: Tensor) -> list[Tensor]:
    return _checked(model(x[:_CHECKED]))


def _in_channels_last(model: nn.Module, x: Tensor) -> list[Tensor]:
    try:
        return _by_stock(*variants.in_channels_last(copy.deepcopy(model), x))
    except RuntimeError:  # `view` of what is channels_last
        return _by_stock(model, x)


def _checked(y: Any) -> list[Tensor]:
    """The tensors of a result, for the images that are checked."""
    return [leaf[:_CHECKED] for leaf in _pytree.tree_leaves(y) if isinstance(leaf, Tensor)]


def _error(y: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error of the tensors of a result; NaN if one is."""
    errors = [relative_error(a, b) for a, b in zip(y, truth, strict=True)]
    return max(errors, key=lambda error: (error != error, error))


def _fault(y: Tensor, by_stock: Tensor, truth: Tensor, other: Tensor) -> str | None:
    return judge(y.to(by_stock.dtype), by_stock, truth, other).fault
