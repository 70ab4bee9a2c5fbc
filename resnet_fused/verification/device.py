"""`resnet-fused verify --device`: every kernel of every backend on listed problems, against float64.

A kernel passes if its error is at most twice stock PyTorch's at the same dtype, or a small floor, and its NaN and Inf
are where stock's are. Where kernels compute in TF32, the error of a convolution of operands rounded to it is a
yardstick too: for some problems stock takes float32 though TF32 is allowed. One that fails is recorded beside the tuning
cache, and the automatic choice avoids it from then on, until it passes.

On a GPU the checks of each backend and dtype run in a process of their own, since after a bad kernel nothing more may run in
its process. The kernels after it are neither passed nor failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from resnet_fused import backends, config, env_report
from resnet_fused.backends import tuning_cache
from resnet_fused.backends.accuracy import judge
from resnet_fused.backends.binding import bind
from resnet_fused.text import table
from resnet_fused.verification.cases import DTYPES, Trial, problems, tensors, trials


@dataclasses.dataclass
class Check:
    """One kernel on one problem. `error` and `stock`: ‖y − truth‖ / ‖truth‖; `reason`: why it failed, or nothing."""

    backend: str
    kernel: str
    op: str
    dtype: str
    problem: str
    error: float | None
    stock: float | None
    reason: str
    fallback: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclasses.dataclass
class Verification:
    """All checks of one device, and what they were made on."""

    device: str
    machine: list[tuple[str, str]]
    checks: list[Check]
    unavailable: list[tuple[str, str]]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def summary(self) -> str:
        """A row for each backend, op and dtype; and each failed check."""
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.backend, check.op, check.dtype), []).append(check)
        rows = []
        for key, checks in groups.items():
            worst = max((c for c in checks if c.error is not None), key=lambda c: c.error or 0.0, default=None)
            kernels = len({c.kernel for c in checks})
            errors = (f"{worst.error:.1e}", f"{worst.stock:.1e}") if worst is not None else ("", "")
            failed = sum(not c.passed for c in checks)
            rows.append((*key, str(kernels), str(len(checks)), *errors, "passed" if not failed else f"{failed} FAILED"))
        header = ("backend", "op", "dtype", "kernels", "checks", "worst error", "stock there", "")
        parts = [table(header, rows)] if rows else []
        failures = [(c.backend, c.kernel, c.op, c.dtype, c.problem, c.reason, c.fallback) for c in self.checks if not c.passed]
        if failures:
            parts.append(table(("failed: backend", "kernel", "op", "dtype", "problem", "reason", "used instead"), failures))
        if self.unavailable:
            parts.append(table(("not verified", "because"), self.unavailable))
        return "\n\n".join(parts)

    def save(self, path: Path) -> None:
        """Writes everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "device": self.device,
            "machine": dict(self.machine),
            "versions": dict(env_report.versions()),
            "passed": self.passed,
            "checks": [{**dataclasses.asdict(c), "passed": c.passed} for c in self.checks],
            "unavailable": dict(self.unavailable),
        }
        path.write_text(json.dumps(content, indent=1))


def main(device: str, out: Path, minutes: float | None = None) -> int:
    """Verifies the device's kernels, prints the report and saves it to `out`; the exit status is 1 if one failed.

    Args:
        minutes: that the checks may take on a GPU.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False).")
        print("GPU kernels are NOT verified, only those for CPUs.\n")
        device = "cpu"
    result = check_kernels(
        torch.device(device), lambda text: print(text, flush=True), None if minutes is None else 60 * minutes
    )
    result.save(out)
    verdict = "All kernels passed" if result.passed else "Some kernels FAILED"
    print(f"\n{result.summary()}\n\n{verdict} on {result.device}; saved {out}")
    return 0 if result.passed else 1


@torch.no_grad()
def check_kernels(
    device: torch.device, progress: Callable[[str], object] = lambda text: None, seconds: float | None = None
) -> Verification:
    """Checks every kernel of every backend that can run here on `device`, and records which ones failed.

    Args:
        progress: is told of each backend that is done.
        seconds: that the checks may take on a GPU; what was not checked by then is neither passed nor failed.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    checks: list[Check] = []
    unavailable, available = [], []
    for name in backends.names():
        reason = backends.get(name).unavailable()
        if reason is not None:
            unavailable.append((name, reason))
        elif name != "reference":
            available.append(name)
    for name, found, skipped in (check_in_processes if device.type == "cuda" else _here)(available, device, seconds):
        if found:
            progress(f"{name}: {len(found)} checks, {sum(not c.passed for c in found)} failed")
        checks += found
        unavailable += skipped
    _record(device, checks)
    for check in checks:
        if not check.passed:
            check.fallback = _fallback(check, device)
    return Verification(str(device), env_report.machine(), checks, unavailable)


# What was not verified, and why.
_Skipped = list[tuple[str, str]]
_Found = Iterator[tuple[str, list[Check], _Skipped]]


def _here(names: list[str], device: torch.device, seconds: float | None) -> _Found:
    """Checks of each backend, in this process."""
    for name in names:
        yield name, *run_checks(name, device, DTYPES)


def check_in_processes(names: list[str], device: torch.device, seconds: float | None) -> _Found:
    """The same from processes of their own, one for each backend and dtype. So many run at once as there are pairs of cores."""
    deadline = None if seconds is None else time.monotonic() + seconds
    tasks = [(name, dtype) for name in names for dtype in DTYPES]
    workers = max(1, min(len(tasks), (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(workers) as pool:
        results = [pool.submit(checks_of_process, *task, device, deadline) for task in tasks]
        for name in names:
            own = [result.result() for (whose, _), result in zip(tasks, results, strict=True) if whose == name]
            yield name, [check for checks, _ in own for check in checks], [one for _, skipped in own for one in skipped]


@torch.no_grad()
def run_checks(
    name: str, device: torch.device, dtypes: Sequence[torch.dtype], done: Callable[[Check], object] = lambda check: None
) -> tuple[list[Check], _Skipped]:
    """Checks of a backend's kernels, up to one that leaves the GPU unusable; what was not verified, and why.

    Args:
        done: is told of each check.
    """
    checks: list[Check] = []
    skipped: _Skipped = []
    for problem, made in trials(name, device, dtypes):
        try:
            for trial in made:
                check = check_trial(trial)
                dead = None if check.passed else why_unusable(device)
                if dead is not None:
                    check.reason += "; it leaves the GPU unusable"
                checks.append(check)
                done(check)
                if dead is not None:
                    why = f"{check.kernel or name} left the GPU unusable: {dead}"
                    return checks, [*skipped, (f"{name}: further kernels", why)]
        except Exception as error:  # of stock's ops, or for want of memory; that is no kernel's fault
            skipped.append((f"{name}: {problem}", _first_line(error)))
            if why_unusable(device) is not None:
                return checks, skipped
    return checks, skipped


def checks_of_process(
    name: str, dtype: torch.dtype, device: torch.device, deadline: float | None
) -> tuple[list[Check], _Skipped]:
    """Checks of a process of its own. Where that ends by a signal, what it had checked before counts."""
    rest = f"{name}: further kernels in {_name(dtype)}"
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds <= 0:
        return [], [(rest, "there was no time left")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checks"
        path.touch()
        code = "import sys; from resnet_fused.verification.device import work; work(*sys.argv[1:])"
        command = [sys.executable, "-c", code, name, _name(dtype), str(device), str(path)]
        try:
            status = subprocess.run(command, env=config.environment_of_child(), check=False, timeout=seconds).returncode
            fault = f"the process that checked them ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            fault = "there was no time left"
        # The last line may be cut off.
        found = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    checks = [Check(**content) for content in found if isinstance(content, dict)]
    skipped: _Skipped = [(what, why) for content in found if isinstance(content, list) for what, why in content]
    return checks, [*skipped, (rest, fault)] if fault else skipped


def work(name: str, dtype: str, device: str, path: str) -> None:
    """Writes each check as a line of JSON when it is made, then a list of what was not verified."""
    reason = backends.get(name).unavailable()  # which loads what the backend consists of
    assert reason is None, reason
    with open(path, "w", buffering=1) as file:

        def write(content: object) -> None:
            file.write(json.dumps(content) + "\n")

        dtypes = (getattr(torch, dtype),)
        _, skipped = run_checks(name, torch.device(device), dtypes, lambda check: write(dataclasses.asdict(check)))
        write(skipped)
    if why_unusable(torch.device(device)) is not None:
        os._exit(0)  # what Python frees at its exit would only meet the same error


def why_unusable(device: torch.device) -> str | None:
    """Why nothing more runs on the GPU in this process; None if something does."""
    if device.type != "cuda":
        return None
    try:
        torch.zeros(1, device=device).add_(1).item()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return None if isinstance(error, torch.OutOfMemoryError) else _first_line(error)
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"


def check_trial(trial: Trial) -> Check:
    """Runs one kernel and judges its result; a kernel that raises has failed, unless it is for want of memory."""
    error = stock = None
    try:
        # The result is likely to be allocated where this was, so that what a kernel leaves unwritten is NaN.
        poison = torch.full_like(trial.stock, torch.nan)
        del poison
        ours = trial.compute()
        if ours.device.type == "cuda":
            torch.cuda.synchronize(ours.device)
        error, stock, fault = judge(ours, trial.stock, trial.truth, trial.rounded)
        reason = fault or ""
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:
        reason = _first_line(raised)
    return Check(trial.backend, trial.kernel, trial.op, _name(trial.dtype), trial.problem, error, stock, reason)


def _record(device: torch.device, checks: list[Check]) -> None:
    """Tells the automatic choice which kernels failed, and which of those that failed earlier pass now."""
    entries: dict[str, dict[str, Any]] = {}
    for check in checks:
        key = tuning_cache.rejection_key(check.backend, check.op, check.dtype, check.kernel)
        known = entries.setdefault(key, {"backend": check.backend, "rejected": ""})
        known["rejected"] = known["rejected"] or check.reason
    if entries:
        tuning_cache.record(device, entries)


def _fallback(check: Check, device: torch.device) -> str:
    """The backend that the automatic choice takes for such a problem now."""
    dtype = getattr(torch, check.dtype)
    for problem in problems(dtype, device):
        if problem.label == check.op:
            if problem.convs:
                return bind(problem, tensors(problem)[1], "auto").backend
            return backends.resolve(problem, "auto").name
    raise AssertionError(f"no problem of {check.op} is verified")
