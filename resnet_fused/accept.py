"""`resnet-fused accept`: whether this library is right and fast on a machine, by one command that keeps to its time.

Each step is a command that a user can run as well (`resnet-fused verify`, `bench`), in a process of its own, so that a kernel
that spoils the GPU costs one step, and a step that takes too long is stopped. What a step wrote until then counts. After each
step the page is written again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from resnet_fused import accept_page, config
from resnet_fused.accept_page import Outcome, Record, Step

# A step isn't begun with less time left, seconds; nor does it get the last of them, in which the page is written.
_LEAST, _RESERVE = 5.0, 2.0

# The command line, by -c, since -m would look for the package in the folder of the results first.
PROGRAM = "import sys; from resnet_fused.cli import main; sys.exit(main())"


def plan(device: str, seconds: float) -> list[Step]:
    """The steps for a device, the most important first.

    Args:
        device: cpu, cuda or cuda:N.
        seconds: for all of them.
    """
    verified = 0.3
    minutes = f"{verified * seconds / 60:.2f}"

    def bench(title: str, folder: str, share: float, *arguments: str) -> Step:
        return Step(title, ("bench", "--device", device, *arguments, "--out", folder), share)

    verify = ("verify", "--device", device, "--minutes", minutes, "--out", accept_page.VERIFIED)
    first = [Step("What is here", ("info",)), Step("Kernels against float64", verify, verified + 0.05)]
    if device == "cpu":
        return [
            *first,
            bench("Inference", "resnet50", 0.35, "--models", "resnet50", "--batches", "1,8", "--dtypes", "float32"),
            bench(
                "Layer by layer", "layers", 0.25, "--layers", "--models", "resnet50", "--batches", "8", "--dtypes", "float32"
            ),
            bench(
                "Inference, more models", "more", 0.3, "--models", "resnet18,resnet101", "--no-compile", "--dtypes", "float32"
            ),
            bench("Training", "training", 0.3, "--training", "--no-compile", "--dtypes", "float32", "--seconds", "2"),
        ]
    return [
        *first,
        bench("Inference", "resnet50", 0.4, "--models", "resnet50", "--dtypes", "float16", "--seconds", "3"),
        bench("Layer by layer", "layers", 0.2, "--layers", "--models", "resnet50", "--dtypes", "float16", "--batches", "1,256"),
        bench(
            *("Inference, more models", "more", 0.3, "--models", "resnet18,resnet101,resnext50_32x4d"),
            *("--dtypes", "bfloat16,float32", "--batches", "1,32", "--no-compile", "--seconds", "1"),
        ),
        bench("Training", "training", 0.3, "--training", "--dtypes", "bfloat16", "--no-compile", "--seconds", "2"),
        Step(
            "Tuning",
            ("tune", "--device", device, "--models", "resnet50", "--dtypes", "float16", "--batches", "1"),
            0.35,
        ),
        bench(
            *("Inference after tuning", "tuned", 0.1, "--models", "resnet50", "--dtypes", "float16", "--batches", "1"),
            *("--no-compile", "--seconds", "2"),
        ),
        bench("Inference in bfloat16", "bfloat16", 0.3, "--models", "resnet50", "--dtypes", "bfloat16", "--seconds", "2"),
    ]


def main(device: str, minutes: float, out: Path) -> int:
    """Runs the plan and writes the page; the exit status is 1 if a kernel was found wrong."""
    record = run(device, minutes, out, lambda text: print(text, flush=True))
    page = out / "report.md"
    print(f"\n{accept_page.summary(record, out)}\n\nThe page: {page}")
    return 1 if accept_page.wrong_kernels(out) else 0


def run(device: str, minutes: float, out: Path, progress: Callable[[str], object] = lambda text: None) -> Record:
    """Runs the plan within the minutes.

    Args:
        out: folder for the page and what the steps write. What an earlier run wrote there is removed.
        progress: is told of each step.
    """
    record = Record(device, minutes)
    start = time.monotonic()
    total = 60 * minutes
    steps = plan(device, total)
    for step in steps:
        (out / accept_page.VERIFIED).unlink(missing_ok=True)
        for pattern in accept_page.RESULTS if step.folder else ():
            for path in (out / step.folder).glob(pattern):
                path.unlink()
    for step in steps:
        spent = time.monotonic() - start
        allowed = min(step.share * total, total - spent - _RESERVE)
        progress(f"[{spent:4.0f} s] {step.title}: {step}")
        if allowed < _LEAST:
            outcome = Outcome(step, 0.0, "there was no time left for it")
        else:
            outcome = _run_step(step, allowed, out)
        if outcome.fault:
            progress(f"         {outcome.fault}")
        record.outcomes.append(outcome)
        (out / "report.md").write_text(accept_page.page(record, out))
    return record


def _run_step(step: Step, seconds: float, out: Path) -> Outcome:
    """Runs one command in the folder, its output in a file there."""
    begin = time.monotonic()
    log = out / step.log
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *step.arguments],
            cwd=out,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=config.environment_of_child(),
            start_new_session=True,  # so that the processes which it starts can be stopped with it
        )
        try:
            status = process.wait(seconds)
            # 1: a kernel was found wrong, which the page says.
            fault = "" if status in (0, 1) else f"it ended with status {status}; see {log.name}"
        except subprocess.TimeoutExpired:
            fault = f"it was stopped after {seconds:.0f} s; what it had written by then counts"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(step, time.monotonic() - begin, fault)
