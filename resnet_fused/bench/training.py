"""Training: one step of a whole model by every variant: time, peak memory, and bytes of activations kept for backward.

The loss of each variant is compared with stock's before its time is shown. Peak memory is that of a process of its own, since a
process's peak never falls.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.bench.timing import Samples, interleave

STOCK = "stock channels_last"
COMPILE = "torch.compile"
OURS = "resnet_fused"
MEMORY_EFFICIENT = "resnet_fused, memory_efficient"
VARIANTS = (STOCK, COMPILE, OURS, MEMORY_EFFICIENT)
# What both torchvision and this library have.
MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)

# Steps whose losses are compared, and how far they may be apart: variants round differently, and steps amplify it.
_CHECKED_STEPS = 3
_WRONG = 0.05


@dataclass(frozen=True)
class TrainingWorkload:
    """One training step: forward, backward, SGD with momentum.

    Attributes:
        model: one of MODELS.
        batch: images.
        size: height and width of the images, pixels.
        autocast: whether the forward pass runs under bfloat16 autocast; otherwise everything is float32.
        device: cpu, cuda or cuda:N.
    """

    model: str = "resnet50"
    batch: int = 16
    size: int = 160
    autocast: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = "bfloat16 autocast" if self.autocast else "float32"
        return f"{self.model}, batch {self.batch}, {dtype}, {self.size}×{self.size}"


@dataclass
class TrainingResult:
    """What was measured of one variant.

    Attributes:
        median: milliseconds a step.
        spread: distance between the quartiles of the times, relative to the median.
        loss: after the first steps.
        kept_bytes: of the activations that forward keeps for backward, parameters not counted; None under torch.compile, which
            decides it inside of its own code.
        peak_bytes: largest resident memory of a process that trains a few steps and does nothing else; on a GPU the most that
            its tensors took there.
    """

    variant: str
    median: float = float("nan")
    spread: float = float("nan")
    steps: int = 0
    loss: float = float("nan")
    kept_bytes: int | None = None
    peak_bytes: int = 0
    note: str = ""


@dataclass
class TrainingComparison:
    """All variants on one workload. `ratio` is another variant's time to ours: above 1, ours is faster."""

    workload: TrainingWorkload
    results: list[TrainingResult] = field(default_factory=list)

    def ratio(self, variant: str) -> float:
        by_name = {r.variant: r for r in self.results}
        return by_name[variant].median / by_name[OURS].median

    def to_json(self) -> dict[str, object]:
        rows = [{**asdict(r), "time_over_ours": self.ratio(r.variant)} for r in self.results]
        return {"workload": asdict(self.workload), "results": rows}


class Trainer:
    """A model, its optimizer and one batch of noise; each call is one training step and gives the loss."""

    def __init__(self, workload: TrainingWorkload, variant: str) -> None:
        import torchvision

        torch.manual_seed(0)
        ours = variant in (OURS, MEMORY_EFFICIENT)
        model: nn.Module = getattr(rf if ours else torchvision.models, workload.model)()
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            if variant == MEMORY_EFFICIENT and isinstance(module, rf.BasicBlock | rf.Bottleneck):
                module.memory_efficient = True
        self.model = model.to(workload.device).to(memory_format=torch.channels_last).train()
        self.run = torch.compile(self.model) if variant == COMPILE else self.model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        x = torch.randn(workload.batch, 3, workload.size, workload.size, dtype=torch.float32, device="cpu")
        self.x = x.to(workload.device, memory_format=torch.channels_last)
        self.target = torch.arange(workload.batch, device=workload.device)
        self.autocast = workload.autocast

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.run(self.x), self.target)

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def kept_bytes(self) -> int:
        """Bytes of the tensors that forward keeps for backward, each memory counted once, parameters not at all."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(kept.values())


def compare(
    workload: TrainingWorkload,
    names: list[str],
    seconds: float,
    step: Callable[[str, float], None] = lambda text, share: None,
) -> TrainingComparison:
    """Runs one workload by the variants of these names, which include OURS and STOCK.

    Args:
        seconds: of timing, for all variants together.
        step: is told what happens and which share of the workload is done, for a progress bar.
    """
    comparison = TrainingComparison(workload)
    trainers: dict[str, Trainer] = {}
    for i, name in enumerate(names):
        step(f"preparing {name}", 0.4 * i / len(names))
        result = TrainingResult(name)
        comparison.results.append(result)
        trainer = Trainer(workload, name)
        try:
            result.loss = [trainer() for _ in range(_CHECKED_STEPS)][-1]
        except Exception as error:  # a compiler that isn't there, say; the report tells it
            result.note = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        if name != COMPILE:
            result.kept_bytes = trainer.kept_bytes()
        trainers[name] = trainer
    stock = next(r.loss for r in comparison.results if r.variant == STOCK)
    for result in comparison.results:
        if result.variant in trainers and not abs(result.loss - stock) <= _WRONG * stock:
            result.note = f"wrong loss ({result.loss:.3f}, stock's {stock:.3f}), so no time is shown"
            del trainers[result.variant]
    for name, done in _time(trainers, seconds, comparison):
        step(f"timing {name}", 0.4 + 0.4 * done)
    trainers.clear()
    gc.collect()
    for i, result in enumerate(comparison.results):
        if result.steps:
            step(f"peak memory of {result.variant}", 0.8 + 0.2 * i / len(names))
            result.peak_bytes = peak_bytes(workload, result.variant)
    return comparison


def _time(trainers: dict[str, Trainer], seconds: float, comparison: TrainingComparison) -> Iterator[tuple[str, float]]:
    samples: dict[str, Samples] = {}
    for name, samples in interleave(trainers, seconds):
        yield name, min(sum(sum(s.times) for s in samples.values()) * 2 / 1e3 / seconds, 1.0)
    for result in comparison.results:
        if result.variant in samples:
            own = samples[result.variant]
            result.median, result.spread, result.steps = own.median, own.spread, len(own.times)


def peak_bytes(workload: TrainingWorkload, variant: str) -> int:
    """Largest resident memory of a fresh process that trains a few steps of the workload by the variant."""
    arguments = [json.dumps(asdict(workload)), variant, str(torch.get_num_threads())]
    command = [sys.executable, "-m", "resnet_fused.bench.training", *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _own_peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    # Not getrusage where there is /proc: a child's ru_maxrss begins with its parent's size.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _train_and_print_peak() -> None:
    parser = argparse.ArgumentParser(description="Trains a few steps and prints the process's peak memory in bytes.")
    parser.add_argument("workload", type=json.loads)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(TrainingWorkload(**arguments.workload), arguments.variant)
    for _ in range(_CHECKED_STEPS):
        trainer()
    print(torch.cuda.max_memory_allocated() if trainer.x.is_cuda else _own_peak())


def line(comparison: TrainingComparison) -> str:
    """A workload in a line, for a log."""
    found = []
    for result in comparison.results:
        time = f"{result.median:.1f} ms a step ({comparison.ratio(result.variant):.2f}×)" if result.steps else ""
        found.append(" ".join(text for text in (f"{result.variant}:", time, result.note) if text))
    return f"{comparison.workload}: {', '.join(found)}"


def table(comparisons: list[TrainingComparison]) -> Table:
    """A row for each variant and workload."""
    result = Table(title="Training step", title_justify="left", header_style="bold")
    columns = ("workload", "variant", "ms", "± IQR", "time / ours", "kept MiB", "peak MiB", "loss", "")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i in (0, 1, 8) else "right", no_wrap=i < 8)
    for comparison in comparisons:
        for i, row in enumerate(comparison.results):
            timed = row.steps > 0
            result.add_row(
                str(comparison.workload) if i == 0 else "",
                row.variant,
                f"{row.median:.{0 if row.median >= 100 else 1}f}" if timed else "–",
                f"{row.spread:.0%}" if timed else "–",
                f"{comparison.ratio(row.variant):.2f}×" if timed else "–",
                f"{row.kept_bytes / 2**20:.0f}" if row.kept_bytes is not None else "–",
                f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "–",
                f"{row.loss:.3f}" if row.loss == row.loss else "–",
                row.note,
                style="bold" if row.variant == OURS else None,
                end_section=i == len(comparison.results) - 1,
            )
    return result


if __name__ == "__main__":
    _train_and_print_peak()
