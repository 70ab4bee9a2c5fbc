"""Runs a model with candidates in the place of its kernels, and times them there.

By itself, called again and again, a layer finds its input and its weights in the caches, where and how its own threads
left them. In the model it finds what the layers before it left, and candidates that are the fastest alone are often not
the fastest there. So each is timed in its place, in runs of the whole model, and what they are worth together is
measured on the whole model as well.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Kernel, Problem, tuning_cache
from resnet_fused.backends.gpu_time import let_launches_queue
from resnet_fused.tuning.candidates import prepare

_Show = Callable[[str], object]
Times = dict[str, list[float]]
"""Seconds by name, in the order of the turns."""

# Turns that every candidate gets; more, up to the other number, while they take less than these seconds.
_TURNS, _MOST_TURNS, _SECONDS = 9, 60, 4.0
# A candidate this many times slower than the best one in the first turns gets no more.
_HOPELESS, _TURNS_OF_HOPE = 1.5, 3
# A GPU waits so many times as long as the host took for the run before.
_ROOM = 1.5


class InModel:
    """A model whose problems are computed, within `override_kernels(in_model.kernel_for)`, by the candidates of one's choice.

    Args:
        run: calls the model.
        chosen: name of the candidate by key of the problem (`tuning_cache.key`), for all problems that are to be chosen for.
    """

    def __init__(self, run: Callable[[], object], chosen: dict[str, str]) -> None:
        self._run, self.chosen = run, chosen
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self.devices: set[torch.device] = set()
        self._host_ms = 0.0  # in which the host launches a run, and some more

    def kernel_for(self, problem: Problem, parameters: ConvParameters) -> Kernel | None:
        """The kernel that runs, at each call, what `chosen` names then; None for a problem that isn't to be chosen for."""
        key = tuning_cache.key(problem)
        if key not in self.chosen:
            return None
        if problem.device.type == "cuda":
            self.devices.add(problem.device)
        kernels: dict[str, Kernel] = {}

        def kernel(x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
            name = self.chosen[key]
            if name not in kernels:
                kernels[name] = prepare(problem, parameters, name)
            if key not in self._marks:
                return kernels[name](x, residual, *more)
            begin = time_mark(problem.device)
            y = kernels[name](x, residual, *more)
            self._marks[key].append((begin, time_mark(problem.device)))
            return y

        return kernel

    def measure(self, names: Mapping[str, list[str]], kept: Mapping[str, set[str]], show: _Show) -> dict[str, Times]:
        """Times each candidate of each problem in runs of the model, without hopeless ones.

        All problems change their candidates at every run, each in a random order of its own.

        Args:
            names: the candidates, by key of the problem.
            kept: those to be timed to the end, hopeless or not.

        Returns:
            For each problem the candidates' times in s, means of the problem's calls in a run.
        """
        order = random.Random(0)
        turns = {key: _Turns(own, kept[key], order) for key, own in names.items()}
        start, runs = time.perf_counter(), 0
        while _go_on(min(turn.done for turn in turns.values()), start):
            runs += 1
            show(f"measuring in the model: run {runs}")
            self.chosen.update({key: turn.next() for key, turn in turns.items()})
            self._marks = {key: [] for key in turns}
            self._run_queued()
            for key, turn in turns.items():
                turn.add([_seconds(*mark) for mark in self._marks[key]])
        self._marks = {}
        return {key: turn.times for key, turn in turns.items()}

    def compare(self, choices: Mapping[str, Mapping[str, str]], show: _Show) -> Times:
        """Times of the whole model in s, one a turn, with each of the `choices` (candidates by key of the problem).

        On a GPU they are those of its kernels, without the host's.
        """
        times: Times = {name: [] for name in choices}
        order = random.Random(0)
        start, done = time.perf_counter(), 0
        while _go_on(done, start):
            done += 1
            # In random order, since a choice may be the slower for what ran before it.
            for name in order.sample([*choices], len(choices)):
                show(f"measuring the model: {name}, turn {done}")
                self.chosen.update(choices[name])
                # The first call finds the caches full of another choice's data.
                self._whole_run()
                times[name].append(self._whole_run())
        return times

    def _whole_run(self) -> float:
        self._synchronize()
        if not self.devices:
            start = time.perf_counter()
            self._run()
            return time.perf_counter() - start
        marks = self._run_queued()
        self._synchronize()
        return max(_seconds(*mark) for mark in marks)

    def _run_queued(self) -> list[tuple[Any, Any]]:
        """Runs the model; on GPUs its launches queue up, so that events time the kernels and not the host. Marks by GPU."""
        begins = {}
        for device in self.devices:
            with torch.cuda.device(device):
                let_launches_queue(self._host_ms)
            begins[device] = time_mark(device)
        start = time.perf_counter()
        self._run()
        self._host_ms = _ROOM * 1e3 * (time.perf_counter() - start)
        # More devices are known after the first run, in which kernels are bound.
        return [(begin, time_mark(device)) for device, begin in begins.items()]

    def _synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


class _Turns:
    """Whose turn it is among a problem's candidates. The first turns, in which kernels are prepared, aren't timed.

    Attributes:
        times: of each candidate that isn't hopeless, or was kept.
        done: turns that all have had.
    """

    def __init__(self, names: list[str], kept: set[str], order: random.Random) -> None:
        self.times: Times = {name: [] for name in names}
        self.done = -1
        self._kept, self._order = kept, order
        self._waiting = list(names)
        self._name = ""

    def next(self) -> str:
        self._name = self._waiting.pop()
        return self._name

    def add(self, seconds: list[float]) -> None:
        if self.done >= 0 and seconds:
            self.times[self._name].append(statistics.mean(seconds))
        if self._waiting:
            return
        self.done += 1
        if self.done == _TURNS_OF_HOPE and all(self.times.values()):
            best = min(map(min, self.times.values()))
            self.times = {n: t for n, t in self.times.items() if n in self._kept or min(t) <= _HOPELESS * best}
        self._waiting = self._order.sample([*self.times], len(self.times))


def _go_on(done: int, start: float) -> bool:
    return done < _TURNS or (done < _MOST_TURNS and time.perf_counter() - start < _SECONDS)


def time_mark(device: torch.device) -> Any:
    """A moment on the device: on a GPU an event, elsewhere the clock's seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
