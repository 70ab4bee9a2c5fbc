"""`resnet-fused verify --device`: every kernel of every backend on listed problems, against float64.

A kernel passes if its error is at most twice stock PyTorch's at the same dtype, or a small floor, and its NaN and Inf are
where stock's are. One that fails is recorded beside the tuning cache, and the automatic choice avoids it from then on, until
it passes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends, env_report
from resnet_fused.backends import records
from resnet_fused.backends.binding import bind
from resnet_fused.backends.norm import NORM_OPS
from resnet_fused.backends.problem import Conv, Folded, Problem
from resnet_fused.backends.reference_bn import ReferenceNorm
from resnet_fused.text import table

_TIMES_STOCK = 2.0
_FLOOR = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_EPS = 1e-5


class _Entry(NamedTuple):
    """A problem of convolutions; `special` puts NaN and Inf into x."""

    why: str
    shape: tuple[int, int, int, int]
    convs: tuple[Conv, ...]
    op: str = "conv2d_bn_add_relu"
    shortcut: bool = False
    special: bool = False


def _3x3(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (3, 3), (stride, stride), (1, 1))


def _1x1(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (1, 1), (stride, stride))


# What a ResNet has, and what is easily wrong: partial tiles, halos, odd channels, split k, one pixel.
_ENTRIES = (
    _Entry("stem", (2, 3, 64, 64), (Conv(3, 64, (7, 7), (2, 2), (3, 3)),), "conv2d_bn_relu"),
    _Entry("3x3", (2, 64, 28, 28), (_3x3(64, 64),)),
    _Entry("3x3 strided", (2, 128, 27, 29), (_3x3(128, 136, 2),), "conv2d_bn_relu"),
    _Entry("1x1", (4, 256, 14, 14), (_1x1(256, 512),)),
    _Entry("1x1 strided, no ReLU", (4, 64, 28, 28), (_1x1(64, 256, 2),), "conv2d_bn"),
    _Entry("long k, few pixels", (1, 512, 7, 7), (_3x3(512, 512),)),
    _Entry("one pixel", (1, 64, 1, 1), (_1x1(64, 40),)),
    _Entry("odd channels", (2, 5, 13, 11), (_3x3(5, 23),)),
    _Entry("dilated", (1, 24, 20, 18), (Conv(24, 48, (3, 3), (1, 1), (2, 2), (2, 2)),)),
    _Entry("grouped", (2, 64, 14, 14), (Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 32),)),
    _Entry("large image", (1, 64, 112, 112), (_3x3(64, 64),)),
    _Entry("NaN and Inf", (1, 64, 14, 14), (_1x1(64, 64),), special=True),
    _Entry("block", (2, 64, 20, 24), (_3x3(64, 64), _3x3(64, 64)), "basic_block"),
    _Entry("block, projected", (2, 64, 20, 24), (_3x3(64, 128, 2), _3x3(128, 128), _1x1(64, 128, 2)), "basic_block", True),
    _Entry("block", (2, 256, 14, 18), (_1x1(256, 64), _3x3(64, 64), _1x1(64, 256)), "bottleneck"),
    _Entry(
        "block, projected", (2, 256, 14, 18), (_1x1(256, 128), _3x3(128, 128, 2), _1x1(128, 512), _1x1(256, 512, 2)),
        "bottleneck", True,
    ),
)  # fmt: skip
_ELEMENTWISE = ((2, 64, 28, 28), (2, 31, 9, 7), (4, 8, 1, 1), (1, 2048, 7, 7))


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
        failures = [
            (c.backend, c.kernel, c.op, c.dtype, c.problem, c.reason, c.fallback) for c in self.checks if not c.passed
        ]
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
    """Verifies the device's kernels, prints the report, saves it to `out`, and gives the exit status: 1 if one failed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): GPU kernels are NOT verified, only those for CPUs.\n")
        device = "cpu"
    result = accept(torch.device(device), lambda text: print(text, flush=True))
    result.save(out)
    print(f"\n{result.summary()}\n\n{'All kernels passed' if result.passed else 'Some kernels FAILED'} on {result.device}; saved {out}")
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
        if name == "reference" or reason is not None:
            unavailable += [] if reason is None else [(name, reason)]
            continue
        found = [*_check_convs(name, device), *_check_add_relu(name, device), *_check_norms(name, device)]
        if found:
            progress(f"{name}: {len(found)} checks, {sum(not c.passed for c in found)} failed")
        checks += found
    _record(device, checks)
    for check in checks:
        if not check.passed:
            check.fallback = _fallback(check, device)
    return Acceptance(str(device), env_report.machine(), checks, unavailable)


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
    for entry in _ENTRIES:
        if entry.op == check.op:
            problem = Problem(entry.op, entry.shape, dtype, device, entry.convs, entry.shortcut)
            return bind(problem, _tensors(problem)[1], "auto").backend
    return backends.resolve(Problem(check.op, _ELEMENTWISE[0], dtype, device), "auto").name


def _relative_error(y: Tensor, truth: Tensor, where: Tensor) -> float:
    scale = truth[where].norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((y.double()[where] - truth[where]).norm() / scale)


def _judge(ours: Tensor, stock: Tensor, truth: Tensor) -> tuple[float, float, str]:
    """Errors of ours and of stock's, and why ours fails, or nothing."""
    where = stock.isfinite() & truth.isfinite()
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        return 0.0, 0.0, f"shape and dtype are {tuple(ours.shape)}, {ours.dtype}; stock's {tuple(stock.shape)}, {stock.dtype}"
    error, yardstick = _relative_error(ours, truth, where & ours.isfinite()), _relative_error(stock, truth, where)
    if (~stock.isfinite() & ours.isfinite()).any():
        return error, yardstick, "a NaN or Inf of stock's disappeared"
    if (where & ~ours.isfinite()).any():
        return error, yardstick, "a NaN or Inf appeared"
    allowed = max(_TIMES_STOCK * yardstick, _FLOOR[ours.dtype])
    return error, yardstick, "" if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"


def _run(compute: Callable[[], Tensor], stock: Tensor, truth: Tensor) -> tuple[float | None, float | None, str]:
    """Runs one kernel and judges it; a kernel that raises has failed."""
    try:
        # The result is likely to be allocated where this was, so that what a kernel leaves unwritten is NaN.
        poison = torch.full_like(stock, torch.nan)
        del poison
        ours = compute()
        if stock.device.type == "cuda":
            torch.cuda.synchronize(stock.device)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return None, None, f"{type(error).__name__}: {first_line[:160]}"
    return _judge(ours, stock, truth)


def _variants(backend: Any, problem: Problem) -> list[str | None]:
    """Names of the backend's kernels for the problem; [None] if it has no choice of them."""
    return (backend.variants(problem) if hasattr(backend, "variants") else []) or [None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_convs(name: str, device: torch.device) -> Iterator[Check]:
    backend: Any = backends.get(name)
    reference = backends.get("reference")
    for entry in _ENTRIES:
        for dtype in _FLOOR:
            problem = Problem(entry.op, entry.shape, dtype, device, entry.convs, entry.shortcut)
            if backend.unsupported(problem) is not None:
                continue
            x, folded, residual = _tensors(problem, entry.special)
            stock = reference.prepare(problem, folded)(x, residual)
            exact = Folded(*(tuple(t.double() for t in group) for group in (folded.weights, folded.shifts)))
            wide = dataclasses.replace(problem, dtype=torch.float64)
            truth = reference.prepare(wide, exact)(x.double(), None if residual is None else residual.double())
            for variant in _variants(backend, problem):

                def compute(variant: str | None = variant) -> Tensor:
                    arguments = (problem, folded) if variant is None else (problem, folded, variant)
                    return backend.prepare(*arguments)(x, residual)

                result = _run(compute, stock, truth)
                yield Check(name, variant or "", entry.op, _name(dtype), f"{entry.why}: {problem}", *result)


def _tensors(problem: Problem, special: bool = False) -> tuple[Tensor, Folded, Tensor | None]:
    """x, parameters and residual, the same everywhere."""
    x = _activation(problem.shape, problem.dtype, problem.device, 0)
    if special:
        x[0, 0, 3, 5], x[-1, -1, -1, -1] = torch.nan, torch.inf
    weights, shifts = [], []
    for i, conv in enumerate(problem.convs):
        shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel
        fan_in = torch.Size(shape[1:]).numel()
        weights.append(_activation(shape, problem.dtype, problem.device, 3 * i + 1) / fan_in**0.5)
        shifts.append(_activation((1, shape[0], 1, 1), problem.dtype, problem.device, 3 * i + 2).flatten())
    residual = _activation(problem.output_shape(), problem.dtype, problem.device, 3) if "add" in problem.op else None
    return x, Folded(tuple(weights), tuple(shifts)), residual


def _activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return t.to(device, dtype, memory_format=torch.channels_last)


def _check_add_relu(name: str, device: torch.device) -> Iterator[Check]:
    backend = backends.get(name)
    for shape in _ELEMENTWISE:
        for dtype in _FLOOR:
            problem = Problem("add_relu", shape, dtype, device)
            if backend.unsupported(problem) is not None:
                continue
            x, residual = (_activation(shape, dtype, device, seed) for seed in range(2))
            x[0, 0, 0, 0] = torch.nan
            stock, truth = (x + residual).relu(), (x.double() + residual.double()).relu()
            result = _run(lambda: backend.prepare(problem, Folded((), ()))(x, residual), stock, truth)  # noqa: B023
            yield Check(name, "", "add_relu", _name(dtype), str(problem), *result)


def _check_norms(name: str, device: torch.device) -> Iterator[Check]:
    """The four passes of a backend that serves norms, each on the truth's statistics, so that errors don't add up."""
    backend: Any = backends.get(name)
    stock = ReferenceNorm()
    for shape in _ELEMENTWISE:
        for dtype in _FLOOR:
            problem = Problem("bn_add_relu", shape, dtype, device)
            if not hasattr(backend, "norm") or any(
                backend.unsupported(dataclasses.replace(problem, op=op)) is not None for op in NORM_OPS
            ):
                continue
            kernels = backend.norm()
            x, residual, dy = (_activation(shape, dtype, device, seed) for seed in range(3))
            x = x * 2 + 1
            weight, bias = (torch.randn(shape[1], generator=torch.Generator().manual_seed(s)).to(device) for s in (4, 5))
            mean, var = stock.statistics(x)
            y = stock.apply(x, residual, mean, var, weight, bias, _EPS, True)
            dweight, dbias, _ = stock.backward_reduce(dy, x, y, mean, var, _EPS, False)
            sums = dweight, dbias, float(x.numel() // shape[1])
            passes: list[tuple[str, Callable[[Any, Callable[[Any], Any]], Tensor]]] = [
                ("mean", lambda k, w: k.statistics(w(x))[0]),  # noqa: B023
                ("var", lambda k, w: k.statistics(w(x))[1]),  # noqa: B023
                ("y", lambda k, w: k.apply(*map(w, (x, residual, mean, var, weight, bias)), _EPS, True)),  # noqa: B023
                ("dweight", lambda k, w: k.backward_reduce(*map(w, (dy, x, y, mean, var)), _EPS, False)[0]),  # noqa: B023
                ("dbias", lambda k, w: k.backward_reduce(*map(w, (dy, x, y, mean, var)), _EPS, False)[1]),  # noqa: B023
                (
                    "dx",
                    lambda k, w: k.backward_apply(  # noqa: B023
                        *map(w, (dy, x, y, mean, var, weight)),  # noqa: B023
                        (w(sums[0]), w(sums[1]), sums[2]),  # noqa: B023
                        _EPS,
                        False,
                    )[0],
                ),
            ]
            for what, run in passes:
                expected, truth = run(stock, lambda t: t), run(stock, lambda t: t.double())
                result = _run(lambda: run(kernels, lambda t: t), expected, truth)  # noqa: B023
                for op in NORM_OPS:
                    yield Check(name, "", op, _name(dtype), f"{what} of {problem}", *result)
