"""One trial: a module and a scenario from a seed and a number, run on stock and on the fused model, and compared."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import resnet_fused as rf
from fuzz.compare import Difference, compare, differs_in_rounding
from fuzz.driver import Driver, Fuse, fused_rows, unload
from fuzz.grammar import Program, generate
from fuzz.prelude import HEAD, HOOKS
from fuzz.script import scenario
from fuzz.snapshots import Event
from resnet_fused.fusion.copying import copy_of

# What is compared with stock: what rf.fuse makes; stock itself, where any difference is the harness's fault; or stock with
# rounding errors added to its convolutions, which shows whether the tolerance lets them pass.
Against = Literal["fused", "stock", "noisy"]
# Numbers may differ for once where a value decides (a ReLU's derivative at 0, a branch on a mean). Then they agree with
# other parameters and inputs, so only what differs with all of these seeds is a difference.
DATA_SEEDS = 3


@dataclass
class Trial:
    """What came of one trial.

    Attributes:
        differences: of the first step that has any.
        convs, fused: convolutions that the report of the fused model names, and those that it says are fused.
        coincidence: values differed, and did not with other parameters and inputs; or stock differed from itself.
        calls: calls of the model that gave a result.
        rounded: calls whose results differ from stock's in any bit, which tells that other code made them.
    """

    seed: int
    number: int
    program: Program
    steps: list[str]
    differences: list[Difference] = field(default_factory=list)
    convs: int = 0
    fused: int = 0
    coincidence: bool = False
    calls: int = 0
    rounded: int = 0
    failed_calls: int = 0
    detail: str = ""

    def __str__(self) -> str:
        source = self.program.source.replace(HOOKS, "").replace(HEAD, "")
        where = "" if self.program.has_source else "  # inspect finds no source"
        steps = "\n".join(f"--- step {i}\n{text}" for i, text in enumerate(self.steps))
        found = "\n".join(map(str, self.differences[:12]))
        more = f"\n… and {len(self.differences) - 12} more" if len(self.differences) > 12 else ""
        return (
            f"===== trial {self.number} of seed {self.seed} ====={where}\n{source.strip()}\n\n"
            f"# Image of {self.program.shape}\n{steps}\n\n{found}{more}\n{self.detail}\n"
            f"Reproduce: python tests/fuzz --seed {self.seed} --only {self.number}\n"
        )


def stock_fuse(model: nn.Module, inplace: bool = False, **_: object) -> nn.Module:
    """What fusing is to stock: a copy where rf.fuse makes one."""
    if inplace:
        return model
    with torch.inference_mode(False):  # so that the copy's parameters count their changes
        return copy_of(model)  # which copies pruned models too


@contextlib.contextmanager
def noisy_convolutions() -> Iterator[None]:
    """Convolutions that round one or two units in the last place otherwise."""
    plain = nn.Conv2d._conv_forward

    def noisy(self: nn.Conv2d, *args: Any) -> torch.Tensor:
        out = plain(self, *args)
        if out.dtype != torch.float32 or not out.numel():
            return out
        with torch.no_grad():
            noise = 1 + 2e-7 * torch.arange(out.shape[-1] * out.shape[-2]).cos().view(out.shape[-2:])
        return out.mul_(noise)

    nn.Conv2d._conv_forward = noisy  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = plain  # type: ignore[method-assign]


def run_trial(seed: int, number: int, against: Against = "fused", ignored: frozenset[str] = frozenset()) -> Trial:
    """Runs one trial; "stock" or "noisy" in the place of "fused" tests the harness."""
    rng = random.Random(f"{seed}-{number}")
    program = generate(rng)
    probe = Driver(program, "probe", 0, stock_fuse)
    unload(probe.module)
    return judge(Trial(seed, number, program, scenario(rng, program, probe.model)), against, ignored)


def judge(trial: Trial, against: Against = "fused", ignored: frozenset[str] = frozenset()) -> Trial:
    """Runs the trial that was made, and writes into it what came of it."""
    seed, number = trial.seed, trial.number
    for attempt in range(DATA_SEEDS):
        data_seed = (abs(hash((seed, number))) + attempt) % 2**20
        differences = _attempt(trial, data_seed, against, ignored)
        if against == "fused" and _has_nan(differences) and _has_nan(_attempt(trial, data_seed, "stock", ignored)):
            # Stock differs from itself: it reads memory that it never wrote.
            trial.coincidence, trial.differences = True, []
            break
        if attempt == 0:
            trial.differences = differences
        if not differences:
            trial.coincidence = attempt > 0
            trial.differences = []
            break
        if any(d.kind not in ("value", "state value") for d in differences):
            break
    return trial


def _has_nan(differences: Sequence[Difference]) -> bool:
    return any(d.kind == "nan" for d in differences)


def spoil_free_memory() -> None:
    """Leaves NaNs in the memory that is handed out next, so that a kernel which reads what it never wrote shows."""
    for size in (2**k for k in range(4, 16)):
        blocks = [torch.full((size,), float("nan")) for _ in range(16)]
        del blocks


def _attempt(trial: Trial, data_seed: int, against: Against, ignored: frozenset[str]) -> list[Difference]:
    program = trial.program

    def our_fuse(model: nn.Module, **options: object) -> nn.Module:
        fused = rf.fuse(model, **options)  # type: ignore[arg-type]
        trial.fused, trial.convs = fused_rows(fused)
        return fused

    def events(name: str, fuse: Fuse) -> tuple[list[Event], dict[int, BaseException]]:
        driver = Driver(program, name, data_seed, fuse)
        return driver.run(trial.steps), driver.errors

    stock, _ = events("stock", stock_fuse)
    trial.calls = sum(e.label.startswith("call") for e in stock)
    trial.failed_calls = sum(e.label.startswith("failed") for e in stock)
    spoil_free_memory()
    with noisy_convolutions() if against == "noisy" else contextlib.nullcontext():
        ours, errors = events("ours", our_fuse if against == "fused" else stock_fuse)
    truth: list[Sequence[Event]] = []

    def lazily() -> Sequence[Event]:
        if not truth:
            truth.append(events("truth", stock_fuse)[0])
        return truth[0]

    differences = compare(stock, ours, lazily, ignored)
    trial.detail = ""
    trial.rounded = sum(differs_in_rounding(a, b) for a, b in zip(stock, ours, strict=False) if a.label.startswith("call"))
    if differences and (error := errors.get(differences[0].step)) is not None:
        trial.detail = f"Ours raised at step {differences[0].step}:\n" + "".join(traceback.format_exception(error)[-6:])
    return differences


def single_thread() -> None:
    torch.set_num_threads(1)
