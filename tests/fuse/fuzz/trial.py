"""One trial: a module and a scenario from a seed and a number, run on stock and on the fused model, and compared."""

from __future__ import annotations

import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion.copying import copy_of
from fuzz.compare import Difference, compare
from fuzz.driver import Driver, Fuse, fused_rows
from fuzz.grammar import Program, generate
from fuzz.prelude import HEAD, HOOKS
from fuzz.script import scenario
from fuzz.snapshots import Event

# Numbers may differ for once where a value decides (a ReLU's derivative at 0, a branch on a mean). Then they agree with
# other parameters and inputs, so only what differs with all of these seeds is a difference.
DATA_SEEDS = 3


@dataclass
class Trial:
    """What came of one trial.

    Attributes:
        differences: of the first step that has any.
        convs, fused: convolutions that the report of the fused model names, and those that it says are fused.
        coincidence: values differed, and did not with other parameters and inputs.
        calls: calls of the model that gave a result.
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
            f"Reproduce: python tests/fuse/fuzz --seed {self.seed} --only {self.number}\n"
        )


def stock_fuse(model: nn.Module, inplace: bool = False, **_: object) -> nn.Module:
    """What fusing is to stock: a copy where rf.fuse makes one."""
    if inplace:
        return model
    with torch.inference_mode(False):  # so that the copy's parameters count their changes
        return copy_of(model)  # which copies pruned models too


def run_trial(seed: int, number: int, itself: bool = False, ignored: frozenset[str] = frozenset()) -> Trial:
    """Runs one trial; with `itself`, stock takes the part of the fused model, and any difference is the harness's fault."""
    rng = random.Random(f"{seed}-{number}")
    program = generate(rng)
    probe = Driver(program, "probe", 0, stock_fuse)
    return judge(Trial(seed, number, program, scenario(rng, program, probe.model)), itself, ignored)


def judge(trial: Trial, itself: bool = False, ignored: frozenset[str] = frozenset()) -> Trial:
    """Runs the trial that was made, and writes into it what came of it."""
    seed, number = trial.seed, trial.number
    for attempt in range(DATA_SEEDS):
        differences = _attempt(trial, (abs(hash((seed, number))) + attempt) % 2**20, itself, ignored)
        if attempt == 0:
            trial.differences = differences
        if not differences:
            trial.coincidence = attempt > 0
            trial.differences = []
            break
        if any(d.kind not in ("value", "state value") for d in differences):
            break
    return trial


def _attempt(trial: Trial, data_seed: int, itself: bool, ignored: frozenset[str]) -> list[Difference]:
    program = trial.program

    def our_fuse(model: nn.Module, **options: object) -> nn.Module:
        fused = rf.fuse(model, **options)  # type: ignore[arg-type]
        trial.fused, trial.convs = fused_rows(fused)
        return fused

    def events(name: str, fuse: Fuse) -> tuple[list[Event], BaseException | None]:
        driver = Driver(program, name, data_seed, fuse)
        found = driver.run(trial.steps)
        return found, getattr(driver, "error", None)

    stock, _ = events("stock", stock_fuse)
    trial.calls = sum(e.label.startswith("call") for e in stock)
    trial.failed_calls = sum(e.label.startswith("failed") for e in stock)
    ours, error = events("ours", stock_fuse if itself else our_fuse)
    truth: list[Sequence[Event]] = []

    def lazily() -> Sequence[Event]:
        if not truth:
            truth.append(events("truth", stock_fuse)[0])
        return truth[0]

    differences = compare(stock, ours, lazily, ignored)
    trial.detail = ""
    if any(d.kind in ("exception", "flow") for d in differences) and error is not None:
        trial.detail = "Ours last raised:\n" + "".join(traceback.format_exception(error)[-6:])
    return differences


def single_thread() -> None:
    torch.set_num_threads(1)
