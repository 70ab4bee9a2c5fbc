"""Inference: whole models, by every variant, each checked against float64 before its time is shown."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from resnet_fused.backends.records import cpu_name
from resnet_fused.bench import variants
from resnet_fused.bench.timing import interleave
from resnet_fused.bench.workloads import Workload
from resnet_fused.tolerance import relative_error

# Images on which results are compared with float64, which takes many times as long.
_CHECKED = 2
# A result further off than this is wrong, not rounded; no time is shown for it.
_WRONG = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


@dataclass
class Result:
    """What was measured of one variant on one workload.

    Attributes:
        median: milliseconds a call.
        spread: distance between the quartiles of the times, relative to the median.
        error: relative norm of the result's distance from float64.
        note: why there is no time.
    """

    variant: str
    median: float = float("nan")
    spread: float = float("nan")
    error: float = float("nan")
    calls: int = 0
    note: str = ""


@dataclass
class Comparison:
    """All variants on one workload. `ratio` is another variant's time to ours: above 1, ours is faster."""

    workload: Workload
    results: list[Result] = field(default_factory=list)

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
        return {"workload": asdict(self.workload), "results": results}


def machine() -> dict[str, object]:
    """What the times were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


@torch.no_grad()
def compare(
    workload: Workload, names: list[str], seconds: float, step: Callable[[str, float], None] = lambda text, share: None
) -> Comparison:
    """Runs one workload by the variants of these names.

    Args:
        seconds: of timing, for all variants together.
        step: is told what happens and which share of the workload is done, for a progress bar.
    """
    model, x = workload.make()
    step("float64 reference", 0.0)
    truth = _truth(model, x)
    comparison = Comparison(workload)
    calls: dict[str, variants.Run] = {}
    for i, name in enumerate(names):
        step(f"preparing {name}", 0.5 * i / len(names))
        result = Result(name)
        comparison.results.append(result)
        try:
            run = variants.make(name, model, x)
            result.error = relative_error(run()[: len(truth)], truth)
        except variants.Unavailable as reason:
            result.note = str(reason)
            continue
        if not result.error < _WRONG[workload.dtype]:
            result.note = f"wrong result (relative error {result.error:.1e}), so no time is shown"
            continue
        calls[name] = run
    for name, samples in interleave(calls, seconds):
        done = sum(sum(s.times) for s in samples.values()) * 2 / 1e3 / seconds
        step(f"timing {name}", 0.5 + 0.5 * min(done, 1.0))
    for result in comparison.results:
        if result.variant in calls:
            own = samples[result.variant]
            result.median, result.spread, result.calls = own.median, own.spread, len(own.times)
    return comparison


def _truth(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(x[:_CHECKED].double())
