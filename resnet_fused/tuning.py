"""rf.tune: measures, for every problem that a model poses, which backend is the fastest on this machine.

For each problem every candidate (a backend, or one of its variants) is first compared with float64, with stock PyTorch
at the same dtype as the yardstick. A wrong one is dropped, loudly, and recorded, so that it isn't tried again. The
others are timed in turns, stock among them, and the fastest is recorded (see `resnet_fused.backends.records`) for the
automatic choice: stock itself, unless another is clearly faster.
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import config
from resnet_fused.backends import Kernel, candidates, get, records
from resnet_fused.backends.binding import compose, parts, watched
from resnet_fused.backends.problem import Folded, Problem
from resnet_fused.text import table
from resnet_fused.tolerance import allowed

_STOCK = "reference"
# Clearly faster: beyond what two measurements of the same kernel differ by.
_GAIN = 0.98
_ROUNDS = 9
_SECONDS_OF_A_TURN = 0.004
# A candidate this many times slower than the best one in the first rounds is not timed further.
_HOPELESS = 1.5
_ROUNDS_OF_HOPE = 3
_IMAGES_AT_ONCE = 4


@dataclass
class Result:
    """What was measured for one problem.

    Attributes:
        problem: the problem.
        chosen: the fastest candidate: a backend's name, "backend:variant", or "parts" for a whole op in its parts.
        ms: median time of each candidate that was timed to the end, in ms.
        dropped: why a candidate was dropped, by its name.
    """

    problem: Problem
    chosen: str
    ms: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass
class Tuning:
    """All results of one `rf.tune`, and the file that keeps them; `print` it for a table."""

    results: list[Result]
    path: Path | None

    def __str__(self) -> str:
        rows = []
        for result in self.results:
            stock, best = result.ms[_STOCK], result.ms[result.chosen]
            notes = f"{len(result.dropped)} dropped" if result.dropped else ""
            ratio = f"{stock / best:.2f}×"
            rows.append((str(result.problem), f"{stock:.3f}", result.chosen, f"{best:.3f}", ratio, notes))
        return table(("problem", "stock ms", "chosen", "ms", "ratio", "note"), rows)


@dataclass
class _Task:
    problem: Problem
    folded: Folded
    whole: bool


@torch.no_grad()
def tune(model: nn.Module, example_inputs: Any, *, progress: bool = True) -> Tuning:
    """Finds the fastest backend for every problem of a model, and keeps it on disk for the automatic choice.

    Takes seconds to minutes, and nothing else should run on the device meanwhile. What is found holds for this device,
    driver and versions, for this input shape and dtype, and for other models with the same problems.

    Args:
        model: what `rf.fuse` gave, or a model of `rf.BasicBlock` and `rf.Bottleneck`, in eval mode.
        example_inputs: a tensor or a tuple of the model's arguments, as the model will be used.
        progress: show a progress bar on a terminal.

    Returns:
        The results. The choices hold from the model's next call on.

    Raises:
        ValueError: the model is in training mode, or has nothing to tune.
        RuntimeError: a candidate left the GPU unusable. It is recorded, and a new process won't try it again.
    """
    if model.training:
        raise ValueError("model is in training mode, where nothing is folded; call model.eval() first.")
    tasks = _tasks(model, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    if not tasks:
        raise ValueError("model has no fused op to tune; pass what rf.fuse returned, see rf.report for what it fused.")
    results, path = [], None
    bar = _Bar(len(tasks), progress)
    try:
        for task in tasks:
            result = _tune(task, bar.show)
            path = _record(result)
            results.append(result)
            bar.done += 1
    finally:
        bar.close()
    return Tuning(results, path)


def _tasks(model: nn.Module, arguments: tuple[Any, ...]) -> list[_Task]:
    """The distinct problems that the model poses, those of parts before those of wholes."""
    found: dict[str, _Task] = {}

    def add(problem: Problem, folded: Folded) -> None:
        own = parts(problem, folded) if problem.op in ("basic_block", "bottleneck", "stem") else []
        for part in own:
            add(*part)
        if 0 not in (*problem.shape, *problem.output_shape()):
            found.setdefault(records.key(problem), _Task(problem, folded, bool(own)))

    # Kernels that are bound already are bound anew, and watched.
    records.forget()
    with watched(add):
        model(*arguments)
    return sorted(found.values(), key=lambda task: task.whole)


def _tune(task: _Task, show: Callable[[str], object]) -> Result:
    problem = task.problem
    show(f"{problem}: stock")
    inputs = _inputs(problem)
    stock = get(_STOCK).prepare(problem, task.folded)
    dropped = records.dropped(problem)
    kernels: dict[str, Kernel] = {_STOCK: stock}
    truth = _Truth(task, inputs, stock)
    for name, prepare in _candidates(task):
        if name in dropped:
            continue
        show(f"{problem}: {name}")
        reason = None
        try:
            kernel = prepare()
            reason = truth.fault(kernel)
        except Exception as error:
            reason = f"it failed: {type(error).__name__}: {error}"
        if reason is None:
            kernels[name] = kernel
            continue
        dropped[name] = reason
        config.logger().warning("rf.tune drops %s for %s: %s", name, problem, reason)
        _check_device(problem, dropped)
    show(f"{problem}: measuring {len(kernels)} candidates")
    times = _measure({name: functools.partial(kernel, *inputs) for name, kernel in kernels.items()}, problem.device)
    # Each time is compared with stock's in the same turn, so that another load on the machine weighs less.
    ratios = {n: statistics.median(a / b for a, b in zip(t, times[_STOCK], strict=True)) for n, t in times.items()}
    best = min(ratios, key=ratios.__getitem__)
    ms = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    return Result(problem, best if ratios[best] <= _GAIN else _STOCK, ms, dropped)


def _candidates(task: _Task) -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """Names of the candidates beside stock, and what prepares each."""
    problem, folded = task.problem, task.folded
    for name in candidates(problem):
        if name == _STOCK:
            continue
        backend = get(name)
        variants = backend.variants(problem) if hasattr(backend, "variants") else []
        for variant in variants:
            prepare = functools.partial(backend.prepare, problem, folded, variant)  # type: ignore[call-arg]
            yield f"{name}:{variant}", prepare
        if not variants:
            yield name, functools.partial(backend.prepare, problem, folded)
    if task.whole:
        yield records.PARTS, lambda: compose(problem, folded, "auto").kernel


def _record(result: Result) -> Path | None:
    backend, _, variant = result.chosen.partition(":")
    entry = {"backend": backend, "variant": variant or None, "ms": result.ms, "dropped": result.dropped}
    try:
        return records.record(result.problem.device, {records.key(result.problem): entry})
    except OSError as error:
        # The choice would be lost with the process; that must not lose the measurements of a long run as well.
        config.logger().warning("rf.tune can't keep its results: %s. Set RESNET_FUSED_CACHE_DIR to a folder of yours.", error)
        return None


def _check_device(problem: Problem, dropped: dict[str, str]) -> None:
    """Raises if the GPU is of no more use to this process, after recording what was dropped."""
    if problem.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(problem.device)
    except RuntimeError as error:
        _record(Result(problem, _STOCK, {}, dropped))
        name = list(dropped)[-1]
        raise RuntimeError(f"{name} left the GPU unusable for {problem}; it is recorded, start a new process.") from error


def _inputs(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Random x and, where the op adds one, residual."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, device=problem.device)
        return values.to(problem.dtype).contiguous(memory_format=problem.memory_format)

    adds = problem.op in ("conv2d_bn_add_relu", "add_relu")
    return random(problem.shape), random(problem.output_shape()) if adds else None


class _Truth:
    """Results of a problem in float64 and by stock, to compare candidates with."""

    def __init__(self, task: _Task, inputs: tuple[Tensor, Tensor | None], stock: Kernel) -> None:
        problem = task.problem
        folded = Folded(tuple(w.double() for w in task.folded.weights), tuple(s.double() for s in task.folded.shifts))
        self.exact = get(_STOCK).prepare(replace(problem, dtype=torch.float64), folded)
        self.cases = [inputs, _with_nan(*inputs)]
        x, residual = inputs
        if residual is not None and residual.shape == x.shape:
            self.cases.append((x, x))
        self.stock = [stock(*case) for case in self.cases]
        error = self._error(inputs, self.stock[0])
        self.allowed = allowed(error, problem.dtype)

    def fault(self, kernel: Kernel) -> str | None:
        """What is wrong with a candidate's results; None if nothing is."""
        for number, (case, stock) in enumerate(zip(self.cases, self.stock, strict=True)):
            before = [None if t is None else t.clone() for t in case]
            y = kernel(*case)
            if y.shape != stock.shape or y.dtype != stock.dtype:
                return f"it gives {y.dtype} of shape {tuple(y.shape)}, and stock {stock.dtype} of {tuple(stock.shape)}"
            if not all(_same(a, b) for a, b in zip(case, before, strict=True)):
                return "it changes its input"
            if (y.isfinite() & ~stock.isfinite()).any():
                return "a NaN or Inf of stock's disappears"
            if number != 1:
                error = self._error(case, y)
                if not error <= self.allowed:
                    return f"its relative error is {error:.1e}, and {self.allowed:.1e} is allowed"
        return None

    def _error(self, case: tuple[Tensor, Tensor | None], y: Tensor) -> float:
        """‖y − truth‖ / ‖truth‖, a few images at a time, so that float64 doesn't fill the memory."""
        x, residual = case
        difference = size = 0.0
        for first in range(0, x.shape[0], _IMAGES_AT_ONCE):
            part = slice(first, first + _IMAGES_AT_ONCE)
            truth = self.exact(x[part].double(), None if residual is None else residual[part].double())
            difference += float((y[part].double() - truth).square().sum())
            size += float(truth.square().sum())
        return math.sqrt(difference / size) if size else math.sqrt(difference)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a.nan_to_num(), b.nan_to_num())


def _with_nan(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same with a NaN in the middle and an Inf in a corner."""
    x = x.clone()
    x[x.shape[0] // 2, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = math.nan
    x[-1, -1, -1, -1] = math.inf
    return x, residual


def _measure(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Times of each call in s, one a turn, without hopeless calls. They take turns, so that any load meets them all."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(1000, math.ceil(_SECONDS_OF_A_TURN / max(_seconds(call, 1, device), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_ROUNDS):
        if turn == _ROUNDS_OF_HOPE:
            best = min(map(min, times.values()))
            times = {n: t for n, t in times.items() if n == _STOCK or min(t) <= _HOPELESS * best}
        for name in times:
            times[name].append(_seconds(calls[name], repeats[name], device))
    return times


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of one call in s, out of `repeats` in a row; on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats


class _Bar:
    """A line on the terminal that shows how far the work is, and what is being done."""

    width = 24

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.done = total, 0
        self.shown = shown and sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self.shown:
            bar = "█" * (self.width * self.done // self.total)
            line = f"tuning {bar:░<{self.width}} {self.done}/{self.total} {text}"
            sys.stderr.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()

    def close(self) -> None:
        if self.shown:
            sys.stderr.write(f"\r\033[Ktuned {self.done} of {self.total} problems\n")
