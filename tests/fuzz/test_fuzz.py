"""Random models and scenarios: what rf.fuse returns can't be told from stock.

The seed is that of the day unless RESNET_FUSED_FUZZ_SEED gives one; a failure prints it and how to run its trial again.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator

import pytest
import torch

from fuzz import trial
from fuzz.compare import Difference
from fuzz.trial import Trial, run_trial

CHUNKS, TRIALS = 10, 30
SEED = int(os.environ.get("RESNET_FUSED_FUZZ_SEED") or datetime.date.today().strftime("%Y%m%d"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fused_is_as_stock(chunk: int) -> None:
    trials = [run_trial(SEED, number) for number in range(chunk * TRIALS, (chunk + 1) * TRIALS)]
    failed = [trial for trial in trials if trial.differences]
    assert sum(trial.fused for trial in trials) > 0, f"seed {SEED}: no convolution was fused"
    if failed:
        numbers = [trial.number for trial in failed]
        text = "\n".join(map(str, failed[:3]))
        pytest.fail(f"seed {SEED}: {len(failed)} of {TRIALS} trials failed: {numbers}\n\n{text}", pytrace=False)


def test_harness_finds_nothing_between_stock_and_itself() -> None:
    failed = [trial for trial in (run_trial(SEED, number, "stock") for number in range(20)) if trial.differences]
    if failed:
        pytest.fail(f"seed {SEED}:\n" + "\n".join(map(str, failed[:3])), pytrace=False)


@pytest.mark.parametrize("stock_differs_from_itself", [False, True])
def test_a_nan_that_stock_gives_by_itself_is_not_ours(stock_differs_from_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(trial: Trial, data_seed: int, against: str, ignored: frozenset[str]) -> list[Difference]:
        return [Difference("nan", 0, "", "")] if against == "fused" or stock_differs_from_itself else []

    monkeypatch.setattr(trial, "_attempt", attempt)
    judged = run_trial(SEED, 0)
    assert bool(judged.differences) != stock_differs_from_itself
