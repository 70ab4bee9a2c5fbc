"""A trial when a GPU first meets a problem, as cuDNN's benchmark mode makes one of its algorithms.

The kernels that need no compilation (stock's, cuDNN's fused ops, the most promising ones of the backend `cuda`) are compared
with float64 and timed on random data of the problem's shapes. The fastest right one is recorded for the automatic choice, in
memory and on disk, so that it is tried once on a machine. A trial takes some milliseconds; `rf.tune` tries more, in their place
in a model.

No trial is made where `RESNET_FUSED_TRIAL=0` is set, under deterministic algorithms, and while a stream is being captured.
Then, and where memory doesn't suffice, the backends' rules choose.
"""

from __future__ import annotations

import functools
import statistics
import threading
from collections.abc import Callable

import torch

from resnet_fused import config
from resnet_fused.backends import Declined, Kernel, candidates, get, records
from resnet_fused.backends.problem import Folded, Problem
from resnet_fused.backends.truth import Truth

_DEVICE, _OPS = "cuda", ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
# Backends whose kernels are there already, and how many of a backend's variants are tried.
_BACKENDS, _VARIANTS = ("reference", "cudnn", "cuda"), 3
_STOCK = "reference"
# A kernel takes stock's place if it takes at most this share of its time.
_GAIN = 0.97
# Each kernel is timed in so many turns, in each of which it runs for about so many milliseconds, and at least so often.
_TURNS, _MILLISECONDS, _FEWEST, _MOST = 3, 1.0, 3, 20
# Clock cycles for which the GPU waits while launches queue up: about a millisecond; and the longest wait in milliseconds.
_SLEEP, _LONGEST_SLEEP = 2_000_000, 50.0

_trials = threading.Lock()


def trial(problem: Problem, folded: Folded) -> None:
    """Tries the problem's kernels and records the fastest, unless there is a record, or a trial isn't possible now."""
    if problem.device.type != _DEVICE or problem.op not in _OPS:
        return
    if records.choice(problem) is not None or not _possible():
        return
    with _trials, torch.no_grad(), torch.cuda.device(problem.device if problem.device.type == "cuda" else -1):
        if records.choice(problem) is not None:
            return
        names = _names(problem)
        if len(names) == 1:
            return
        _say_once()
        try:
            entry = _try(problem, folded, names)
        except torch.OutOfMemoryError:
            config.logger().info("no kernel of %s was tried, since the GPU's memory doesn't suffice", problem)
            return
    try:
        records.add(problem.device, {records.key(problem): entry})
    except OSError as error:
        _warn_of_disk(str(error))


def _possible() -> bool:
    return (
        config.trial()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.compiler.is_compiling()
    )


def _names(problem: Problem) -> list[str]:
    """The candidates: a backend, or "backend:variant"; stock's first. None that was found wrong before."""
    found = []
    served, dropped = candidates(problem), records.dropped(problem)
    for name in _BACKENDS:
        if name not in served:
            continue
        backend = get(name)
        variants = backend.variants(problem)[:_VARIANTS] if hasattr(backend, "variants") else []
        for variant in variants or [None]:
            own = name if variant is None else f"{name}:{variant}"
            if own not in dropped and records.rejected(problem, name, variant) is None:
                found.append(own)
    return found


def _try(problem: Problem, folded: Folded, names: list[str]) -> dict[str, object]:
    """What is recorded: the fastest candidate, the times, and why others were dropped."""
    truth = Truth(problem, folded, special=False)
    kernels: dict[str, Kernel] = {}
    dropped: dict[str, str] = {}
    for name in names:
        backend, _, variant = name.partition(":")
        try:
            kernel = get(backend).prepare(problem, folded, *((variant,) if variant else ()))
            fault = None if name == _STOCK else truth.fault(kernel)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, Declined) as error:
            config.logger().debug("%s can't serve %s: %s", name, problem, error)
            continue
        if fault is None:
            kernels[name] = kernel
        else:
            dropped[name] = fault
            config.logger().warning("%s is wrong for %s and won't be used for it: %s", name, problem, fault)
    ms = _times({name: functools.partial(kernel, truth.x, truth.residual) for name, kernel in kernels.items()})
    best = min(ms, key=ms.__getitem__)
    if ms[best] > _GAIN * ms[_STOCK]:
        best = _STOCK
    backend, _, variant = best.partition(":")
    return {"backend": backend, "variant": variant or None, "ms": ms, "dropped": dropped}


def _times(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call on the GPU, taken in turns."""
    counts = {}
    for name, call in calls.items():
        call()
        once = _elapsed(call, 1)
        counts[name] = max(_FEWEST, min(_MOST, int(_MILLISECONDS / max(once, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            found[name].append(_elapsed(call, counts[name]) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}


def let_launches_queue(milliseconds: float = 1.0) -> None:
    """Lets the current stream wait for about so long, while the host launches what is to be timed, and the GPU needn't then."""
    torch.cuda._sleep(int(_SLEEP * min(max(milliseconds, 1.0), _LONGEST_SLEEP)))


def _elapsed(call: Callable[[], object], count: int) -> float:
    """Milliseconds that the GPU takes for so many calls, whose launches wait for it and not it for them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    let_launches_queue()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@functools.cache
def _say_once() -> None:
    path = config.cache_dir()
    config.logger().info("kernels are tried at the first call of each problem, and the choices kept in %s", path)


@functools.cache
def _warn_of_disk(reason: str) -> None:
    config.logger().warning(
        "choices of kernels can't be kept on disk: %s. Set RESNET_FUSED_CACHE_DIR to a folder of yours.", reason
    )
