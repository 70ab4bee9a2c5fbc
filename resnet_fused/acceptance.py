"""`resnet-fused verify --device`: every kernel of every backend on listed problems, against float64.

A kernel passes if its error is at most twice stock PyTorch's at the same dtype, or a small floor, and its NaN and Inf
are where stock's are. Where kernels compute in TF32, the error of a convolution of operands rounded to it is a
yardstick too: for some problems stock takes float32 though TF32 is allowed. One that fails is recorded beside the tuning
cache, and the automatic choice avoids it from then on, until it passes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, env_report
from resnet_fused.backends import records
from resnet_fused.backends.binding import bind
from resnet_fused.backends.problem import Problem
from resnet_fused.text import table
from resnet_fused.tolerance import allowed, relative_error
from resnet_fused.trials import ELEMENTWISE, ENTRIES, Trial, tensors, trials


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
class Acceptance:
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


def main(device: str, out: Path) -> int:
    """Verifies the device's kernels, prints the report and saves it to `out`; the exit status is 1 if one failed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False).")
        print("GPU kernels are NOT verified, only those for CPUs.\n")
        device = "cpu"
    result = accept(torch.device(device), lambda text: print(text, flush=True))
    result.save(out)
    verdict = "All kernels passed" if result.passed else "Some kernels FAILED"
    print(f"\n{result.summary()}\n\n{verdict} on {result.device}; saved {out}")
    return 0 if result.passed else 1


@torch.no_grad()
def accept(device: torch.device, progress: Callable[[str], object] = lambda text: None) -> Acceptance:
    """Checks every kernel of every backend that can run here on `device`, and records which ones failed."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    checks: list[Check] = []
    unavailable = []
    for name in backends.names():
        reason = backends.get(name).unavailable()
        if reason is not None:
            unavailable.append((name, reason))
        elif name != "reference":
            found = [_check(trial) for trial in trials(name, device)]
            if found:
                progress(f"{name}: {len(found)} checks, {sum(not c.passed for c in found)} failed")
            checks += found
    _record(device, checks)
    for check in checks:
        if not check.passed:
            check.fallback = _fallback(check, device)
    return Acceptance(str(device), env_report.machine(), checks, unavailable)


def _check(trial: Trial) -> Check:
    """Runs one kernel and judges its result; a kernel that raises has failed."""
    dtype = str(trial.dtype).removeprefix("torch.")
    error = stock = None
    try:
        # The result is likely to be allocated where this was, so that what a kernel leaves unwritten is NaN.
        poison = torch.full_like(trial.stock, torch.nan)
        del poison
        ours = trial.compute()
        if ours.device.type == "cuda":
            torch.cuda.synchronize(ours.device)
        error, stock, reason = _judge(ours, trial)
    except Exception as raised:
        reason = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0][:160]}"
    return Check(trial.backend, trial.kernel, trial.op, dtype, trial.problem, error, stock, reason)


def _record(device: torch.device, checks: list[Check]) -> None:
    """Tells the automatic choice which kernels failed, and which of those that failed earlier pass now."""
    entries: dict[str, dict[str, Any]] = {}
    for check in checks:
        key = records.rejection_key(check.backend, check.op, check.dtype, check.kernel)
        known = entries.setdefault(key, {"backend": check.backend, "rejected": ""})
        known["rejected"] = known["rejected"] or check.reason
    if entries:
        records.record(device, entries)


def _fallback(check: Check, device: torch.device) -> str:
    """The backend that the automatic choice takes for such a problem now."""
    dtype = getattr(torch, check.dtype)
    for entry in ENTRIES:
        if entry.op == check.op:
            problem = Problem(entry.op, entry.shape, dtype, device, entry.convs, entry.shortcut)
            return bind(problem, tensors(problem)[1], "auto").backend
    return backends.resolve(Problem(check.op, ELEMENTWISE[0], dtype, device), "auto").name


def _judge(ours: Tensor, trial: Trial) -> tuple[float, float, str]:
    """Errors of ours and of stock's, and why ours fails, or nothing."""
    stock, truth = trial.stock, trial.truth
    where = stock.isfinite() & truth.isfinite()
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        return (
            0.0,
            0.0,
            f"shape and dtype are {tuple(ours.shape)}, {ours.dtype}; stock's {tuple(stock.shape)}, {stock.dtype}",
        )
    error, yardstick = relative_error(ours, truth, where & ours.isfinite()), relative_error(stock, truth, where)
    if (~stock.isfinite() & ours.isfinite()).any():
        return error, yardstick, "a NaN or Inf of stock's disappeared"
    if (where & ~ours.isfinite()).any():
        return error, yardstick, "a NaN or Inf appeared"
    rounding = 0.0 if trial.rounded is None else relative_error(trial.rounded, truth, where)
    most = allowed(max(yardstick, rounding), ours.dtype)
    return error, yardstick, "" if error <= most else f"error {error:.1e}, allowed {most:.1e}"
