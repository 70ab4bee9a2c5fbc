"""A trial when a GPU first meets a problem, as cuDNN's benchmark mode makes one of its algorithms.

The kernels that need no compilation (stock's, cuDNN's fused ops, the most promising ones of the backend `cuda`) are compared
with float64 and timed on random data of the problem's shapes. The fastest right one is recorded for the automatic choice, in
memory and on disk, so that it is tried once on a machine. Kernels of a whole block are tried beside its parts' own. A trial
takes some milliseconds; `rf.tune` tries more, in their place in a model.

No trial is made where `RESNET_FUSED_TRIAL=0` is set, under deterministic algorithms, and while a stream is being captured.
Then, and where memory doesn't suffice, the backends' rules choose.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

from resnet_fused import config
from resnet_fused.backends import STOCK, ConvParameters, Declined, Kernel, Problem, candidates, get, gpu_time, tuning_cache
from resnet_fused.backends.accuracy import ProblemCheck
from resnet_fused.backends.problem import Conv, Kind

DEVICE = "cuda"
# How many of a backend's plans are tried.
_PLANS = 3
# A kernel takes the place of stock's, or of a block's parts, if it takes at most this share of their time.
_GAIN = 0.97

# One that the same thread can take again: the parts of a block are tried within the trial of the block.
_trials = threading.RLock()


def trial(problem: Problem, parameters: ConvParameters, in_parts: Callable[[ConvParameters], Kernel] | None = None) -> None:
    """Tries the problem's kernels and records the fastest, unless there is a record, or a trial isn't possible now.

    Args:
        problem: a convolution, or steps of which a kernel may compute several.
        parameters: its weights and biases.
        in_parts: makes the kernel that computes a divisible problem in its parts, with which kernels of the whole compare.
    """
    if problem.device.type != DEVICE or problem.kind not in (Kind.CONVOLUTION, Kind.PROGRAM):
        return
    if any(isinstance(step.operation, Conv) and not step.epilogue.bias for step in problem.steps):
        return
    if tuning_cache.choice(problem) is not None or not _possible():
        return
    with _trials, torch.no_grad(), torch.cuda.device(problem.device if problem.device.type == "cuda" else -1):
        if tuning_cache.choice(problem) is not None:
            return
        names = _names(problem, STOCK if in_parts is None else tuning_cache.PARTS)
        if len(names) == 1:
            return
        say_once()
        try:
            entry = _try(problem, parameters, names, in_parts)
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


def _names(problem: Problem, first: str) -> list[str]:
    """The candidates: a backend, or "backend:plan", after the `first`. None that was found wrong before."""
    found = [first]
    served, dropped = candidates(problem), tuning_cache.dropped(problem)
    for name in served:
        if name == STOCK:
            continue
        backend = get(name)
        if not backend.ready:
            continue
        for plan in backend.plans(problem)[:_PLANS] or [""]:
            own = f"{name}:{plan}" if plan else name
            if own not in dropped and tuning_cache.rejected(problem, name, plan) is None:
                found.append(own)
    return found


def _try(
    problem: Problem,
    parameters: ConvParameters,
    names: list[str],
    in_parts: Callable[[ConvParameters], Kernel] | None,
) -> dict[str, object]:
    """What is recorded: the fastest candidate, the times, and why others were dropped. The first one is known to be right."""
    # So that what the others packed goes with them.
    parameters = ConvParameters(*parameters.tensors())
    truth = ProblemCheck(problem, parameters, special=False)
    kernels: dict[str, Kernel] = {}
    dropped: dict[str, str] = {}
    for name in names:
        backend, _, plan = name.partition(":")
        try:
            if name == tuning_cache.PARTS and in_parts is not None:
                kernel = in_parts(parameters)
            else:
                kernel = get(backend).prepare(problem, parameters, plan or None)
            fault = None if name == names[0] else truth.fault(kernel)
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
    if ms[best] > _GAIN * ms[names[0]]:
        best = names[0]
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
