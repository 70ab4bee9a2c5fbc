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
import threading

import torch

from resnet_fused import config
from resnet_fused.backends import STOCK, ConvParameters, Declined, Kernel, Problem, candidates, get, gpu_time, tuning_cache
from resnet_fused.backends.accuracy import ProblemCheck
from resnet_fused.backends.problem import Kind

DEVICE = "cuda"
# How many of a backend's plans are tried.
_PLANS = 3
# A kernel takes stock's place if it takes at most this share of its time.
_GAIN = 0.97

_trials = threading.Lock()


def trial(problem: Problem, parameters: ConvParameters) -> None:
    """Tries the problem's kernels and records the fastest, unless there is a record, or a trial isn't possible now."""
    if problem.device.type != DEVICE or problem.kind is not Kind.CONVOLUTION or not problem.epilogue.bias:
        return
    if tuning_cache.choice(problem) is not None or not _possible():
        return
    with _trials, torch.no_grad(), torch.cuda.device(problem.device if problem.device.type == "cuda" else -1):
        if tuning_cache.choice(problem) is not None:
            return
        names = _names(problem)
        if len(names) == 1:
            return
        say_once()
        try:
            entry = _try(problem, parameters, names)
        except torch.OutOfMemoryError:
            config.logger().info("no kernel of %s was tried, since the GPU's memory doesn't suffice", problem)
            return
    try:
        tuning_cache.add(problem.device, {tuning_cache.key(problem): entry})
    except OSError as error:
        warn_of_disk(str(error))


def _possible() -> bool:
    return (
        config.trial()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.compiler.is_compiling()
    )


def _names(problem: Problem) -> list[str]:
    """The candidates: a backend, or "backend:plan"; stock's first. None that was found wrong before."""
    found = []
    served, dropped = candidates(problem), tuning_cache.dropped(problem)
    for name in (STOCK, *(name for name in served if name != STOCK)):
        backend = get(name)
        if not backend.ready:
            continue
        for plan in backend.plans(problem)[:_PLANS] or [""]:
            own = f"{name}:{plan}" if plan else name
            if own not in dropped and tuning_cache.rejected(problem, name, plan) is None:
                found.append(own)
    return found


def _try(problem: Problem, parameters: ConvParameters, names: list[str]) -> dict[str, object]:
    """What is recorded: the fastest candidate, the times, and why others were dropped."""
    # So that what the others packed goes with them.
    parameters = ConvParameters(*parameters.tensors())
    truth = ProblemCheck(problem, parameters, special=False)
    kernels: dict[str, Kernel] = {}
    dropped: dict[str, str] = {}
    for name in names:
        backend, _, plan = name.partition(":")
        try:
            kernel = get(backend).prepare(problem, parameters, plan or None)
            fault = None if name == STOCK else truth.fault(kernel)
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
    ms = gpu_time.medians({name: functools.partial(kernel, truth.x, truth.residual) for name, kernel in kernels.items()})
    best = min(ms, key=ms.__getitem__)
    if ms[best] > _GAIN * ms[STOCK]:
        best = STOCK
    backend, _, plan = best.partition(":")
    return {"backend": backend, "plan": plan or None, "ms": ms, "dropped": dropped}


@functools.cache
def say_once() -> None:
    path = config.cache_dir()
    config.logger().info("kernels are tried at the first call of each problem, and the choices kept in %s", path)


@functools.cache
def warn_of_disk(reason: str) -> None:
    config.logger().warning(
        "choices of kernels can't be kept on disk: %s. Set RESNET_FUSED_CACHE_DIR to a folder of yours.", reason
    )
