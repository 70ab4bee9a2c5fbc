"""rf.tune: measures, for every problem that a model poses, which backend is the fastest on this machine.

For each problem every candidate (a backend, or one of its plans) is first compared with float64, with stock PyTorch
at the same dtype as the yardstick. A wrong one is dropped, loudly, and recorded, so that it isn't tried again. The
others are timed in their place in the model. What is taken by rule stays unless another is clearly faster there, and
the changes are recorded (see `resnet_fused.backends.tuning_cache`) for the automatic choice only if they make the whole
model faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fused import config
from resnet_fused.backends import STOCK, ConvParameters, Problem, tuning_cache
from resnet_fused.backends.accuracy import ProblemCheck
from resnet_fused.backends.binding import divided, is_divisible, override_kernels
from resnet_fused.text import table
from resnet_fused.tuning import candidates
from resnet_fused.tuning.compiling import Candidate, compile_ahead
from resnet_fused.tuning.in_model import InModel, Times
from resnet_fused.tuning.progress import Progress

# Clearly faster: beyond what two measurements of the same kernel in the same place, or of the same model, differ by.
_GAIN, _GAIN_OF_MODEL = 0.97, 0.99
# What a model's kernels are: all stock, as without tuning, or as measured.
ALL_STOCK, BY_RULE, TUNED = "stock", "by rule", "tuned"


@dataclass
class Result:
    """What was measured for one problem.

    Attributes:
        problem: the problem.
        chosen: the candidate taken: a backend's name, "backend:plan", or "parts" for a whole op in its parts.
        ms: median time of each candidate in the model, in ms a call.
        dropped: why a candidate was found wrong, by its name. It isn't tried again.
        failed: why a candidate gave no result, by its name: memory may not have sufficed, or no compiler been there. It is
            tried again by the next `rf.tune`.
    """

    problem: Problem
    chosen: str
    ms: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Tuning:
    """All results of one `rf.tune`, and the file that keeps them; `print` it for a table.

    Attributes:
        results: one for each problem of the model.
        model_ms: median time of the model in ms, by what its kernels were: "stock", "by rule" or "tuned".
        over_rule: median of the model's times over those by rule in the same turn, by the same names. The choice is made by
            these, since another load on the machine changes both times of a turn, and the medians more than the ratio.
        taken: which of them the choices are.
        path: the file; None where it can't be written.
    """

    results: list[Result]
    model_ms: dict[str, float]
    over_rule: dict[str, float]
    taken: str
    path: Path | None

    def __str__(self) -> str:
        rows = []
        for result in self.results:
            stock, best = (result.ms.get(name, float("nan")) for name in (STOCK, result.chosen))
            counts = {"dropped": len(result.dropped), "failed": len(result.failed)}
            notes = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            rows.append((str(result.problem), f"{stock:.3f}", result.chosen, f"{best:.3f}", f"{stock / best:.2f}×", notes))
        model = ", ".join(f"{ms:.3f} ms {name}" for name, ms in self.model_ms.items())
        others = ", ".join(f"{ratio:.3f} {name}" for name, ratio in self.over_rule.items() if name != BY_RULE)
        reason = f"since nothing is at {_GAIN_OF_MODEL} or below"
        if self.taken != BY_RULE:
            reason = f"the least that is at {_GAIN_OF_MODEL} or below"
        return (
            table(("problem", "stock ms", "chosen", "ms", "ratio", "note"), rows)
            + f"\nThe model as a whole, medians: {model}.\nTime over that {BY_RULE} in the same turn, medians: {others}. "
            f"Taken: {self.taken}, {reason}."
        )


@dataclass
class Task:
    problem: Problem
    parameters: ConvParameters
    whole: bool


@torch.no_grad()
def tune(model: nn.Module, example_inputs: Any, *, progress: bool = True) -> Tuning:
    """Finds the fastest backend for every problem of a model, and keeps it on disk for the automatic choice.

    Takes seconds to minutes, and nothing else should run on the device meanwhile. What is found holds for this device,
    driver and versions, for this input shape and dtype, and for other models with the same problems. The model is left
    no slower than it was untuned, and no slower than on stock ops.

    Args:
        model: what `rf.fuse` gave, or a model of `rf.BasicBlock` and `rf.Bottleneck`, in eval mode. It is run some
            hundred times.
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
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tasks = tasks_of(model, arguments)
    if not tasks:
        raise ValueError(
            "model has no fused op to tune whose backend is chosen automatically; pass what rf.fuse returned, without a "
            "backend of your choice. See rf.report for what it fused."
        )
    # While the parts are measured, wholes are composed of them.
    in_model = InModel(lambda: model(*arguments), {k: tuning_cache.PARTS if task.whole else STOCK for k, task in tasks.items()})
    bar = Progress(len(tasks), progress)
    try:
        with override_kernels(in_model.kernel_for):
            compile_ahead(to_compile(tasks), bar.show)
            results, times, taken = tune_tasks(tasks, in_model, bar)
    finally:
        bar.close()
        for task in tasks.values():
            task.parameters.forget()  # what was packed for candidates
    model_ms = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    return Tuning(results, model_ms, over(times, BY_RULE), taken, record_results(results))


def tasks_of(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Task]:
    """The distinct problems that the model poses, by their keys, those of parts before those of wholes."""
    found: dict[str, Task] = {}

    def add(problem: Problem, parameters: ConvParameters) -> None:
        # Not by calling itself: that would be a cycle, in which what candidates packed would outlive the tuning.
        parts = divided(problem, parameters) if is_divisible(problem) else []
        # Pools are stock's.
        own = [(part.problem, part.parameters) for part in parts if part.problem.convs]
        for each, its in (*own, (problem, parameters)):
            if 0 not in (*each.shape, *each.output_shape()):
                found.setdefault(tuning_cache.key(each), Task(each, its, each is problem and bool(parts)))

    with override_kernels(add):
        model(*arguments)
    return dict(sorted(found.items(), key=lambda item: item[1].whole))


def to_compile(tasks: dict[str, Task]) -> list[Candidate]:
    """Candidates for a GPU's problems that have to be compiled."""
    found = []
    for task in tasks.values():
        if task.problem.device.type == "cuda":
            names, dropped = candidates.names(task.problem), tuning_cache.dropped(task.problem)
            found += [(task.problem, n) for n in names if n not in dropped and not candidates.is_ready(n)]
    return found


def tune_tasks(tasks: dict[str, Task], model: InModel, progress: Progress) -> tuple[list[Result], Times, str]:
    """The results, times of the whole model, and which of these choices was taken."""
    rules, results = {}, {}
    for whole in sorted({task.whole for task in tasks.values()}):
        names, dropped, failed = {}, {}, {}
        for key, task in tasks.items():
            if task.whole == whole:
                names[key], dropped[key], failed[key] = _right(task, progress.show)
                by_rule = candidates.by_rules(task.problem)
                rules[key] = by_rule if by_rule in names[key] else STOCK
                progress.done += 1
        times = model.measure(names, {key: {STOCK, rules[key]} for key in names}, progress.show)
        for key, found in times.items():
            ms = {name: 1e3 * statistics.median(own) for name, own in found.items() if own}
            results[key] = Result(tasks[key].problem, _fastest(found, rules[key], _GAIN), ms, dropped[key], failed[key])
            model.chosen[key] = results[key].chosen
    tuned = {key: result.chosen for key, result in results.items()}
    choices = {ALL_STOCK: dict.fromkeys(tasks, STOCK), BY_RULE: rules, TUNED: tuned}
    model_times = model.compare(choices, progress.show)
    taken = _fastest(model_times, BY_RULE, _GAIN_OF_MODEL)
    for key, result in results.items():
        result.chosen = choices[taken][key]
    return list(results.values()), model_times, taken


def _right(task: Task, show: Callable[[str], object]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Candidates that compute the problem as they should; why others are wrong, by now or before; why others failed."""
    problem = task.problem
    show(f"{problem}: stock")
    truth = ProblemCheck(problem, task.parameters)
    right, dropped, failed = [STOCK], tuning_cache.dropped(problem), {}
    for name in candidates.names(problem):
        if name == STOCK or name in dropped:
            continue
        show(f"{problem}: {name}")
        try:
            reason = truth.fault(candidates.prepare(problem, task.parameters, name))
        except Exception as error:
            # That says nothing of its results: memory, a compiler or disk space may be there the next time.
            failed[name] = f"{type(error).__name__}: {error}"
            config.logger().warning("rf.tune leaves out %s for %s: it failed: %s", name, problem, failed[name])
            _check_device(problem, dropped, name, failed[name])
            continue
        if reason is None:
            right.append(name)
            continue
        dropped[name] = reason
        config.logger().warning("rf.tune drops %s for %s: %s", name, problem, reason)
        _check_device(problem, dropped, name, reason)
    return right, dropped, failed


def over(times: Times, base: str) -> dict[str, float]:
    """Median of each name's times over those of `base` in the same turn. The last turn may be incomplete."""
    return {n: statistics.median(a / b for a, b in zip(t, times[base], strict=False)) for n, t in times.items() if t}


def _fastest(times: Times, base: str, gain: float) -> str:
    """The name with the shortest times: `base`, unless another takes at most `gain` times as long.

    Times are compared with those of `base` in the same turn, so that another load on the machine weighs less.
    """
    ratios = over(times, base)
    best = min(ratios, key=ratios.__getitem__, default=base)
    return best if ratios.get(best, 1.0) <= gain else base


def record_results(results: list[Result]) -> Path | None:
    try:
        for device in {result.problem.device for result in results}:
            own = [result for result in results if result.problem.device == device]
            path = tuning_cache.record(device, {tuning_cache.key(result.problem): _entry(result) for result in own})
        return path
    except OSError as error:
        # The choice would be lost with the process; that must not lose the measurements of a long run as well.
        config.logger().warning("rf.tune can't keep its results: %s. Set RESNET_FUSED_CACHE_DIR to a folder of yours.", error)
        return None


def _entry(result: Result) -> dict[str, Any]:
    backend, _, plan = result.chosen.partition(":")
    return {"backend": backend, "plan": plan or None, "ms": result.ms, "dropped": result.dropped}


def _check_device(problem: Problem, dropped: dict[str, str], name: str, reason: str) -> None:
    """Raises if the GPU is of no more use to this process, after recording what was dropped and the candidate that did it."""
    if problem.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(problem.device)
    except RuntimeError as error:
        record_results([Result(problem, STOCK, {}, {**dropped, name: reason})])
        raise RuntimeError(f"{name} left the GPU unusable for {problem}; it is recorded, start a new process.") from error
