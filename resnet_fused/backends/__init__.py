"""The registry of backends, and the choice of one for a problem.

A backend is a `Backend` with a list of implementations. Its choice follows, in this order: the argument, `use_backend`,
the environment's RESNET_FUSED_BACKEND, automatic. An explicit choice that can't serve raises `BackendError` with the
reason; the automatic one takes what `rf.tune` recorded, else the first backend of `AUTOMATIC_ORDER` that serves the
problem and is known to win it, and ends with the reference, which is stock PyTorch and serves everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from resnet_fused import config
from resnet_fused.backends import tuning_cache
from resnet_fused.backends.freezing import freezing
from resnet_fused.backends.implementation import Backend, BackendError, Declined, Implementation, JoinableKernel, Kernel
from resnet_fused.backends.parameters import NO_PARAMETERS, ConvParameters
from resnet_fused.backends.problem import Activation, Conv, Epilogue, Pool, Precision, Problem, Step

__all__ = [
    "NO_PARAMETERS",
    "STOCK",
    "Activation",
    "Backend",
    "BackendError",
    "Conv",
    "ConvParameters",
    "Declined",
    "Epilogue",
    "Implementation",
    "JoinableKernel",
    "Kernel",
    "Pool",
    "Precision",
    "Problem",
    "Step",
    "available_backends",
    "by_rules",
    "candidates",
    "check_available",
    "choice",
    "choosing",
    "freezer",
    "get",
    "names",
    "resolve",
    "stock",
    "use_backend",
]

# Module and class of each backend; the module is imported when the backend is first asked for.
BACKENDS: dict[str, tuple[str, str]] = {
    "reference": ("resnet_fused.backends.reference.backend", "Reference"),
    "onednn": ("resnet_fused.backends.onednn.backend", "OneDNN"),
    "cpu": ("resnet_fused.backends.cpu.backend", "CPU"),
    "cuda": ("resnet_fused.backends.cuda.backend", "CUDA"),
    "triton": ("resnet_fused.backends.triton.backend", "Triton"),
    "cudnn": ("resnet_fused.backends.cudnn.backend", "CuDNN"),
}

STOCK = "reference"
"""Name of the backend that is stock PyTorch."""

AUTOMATIC_ORDER = ("cpu", "onednn", "cudnn", "cuda", STOCK)

_context_choice: ContextVar[str | None] = ContextVar("resnet_fused_backend", default=None)


def names() -> tuple[str, ...]:
    """Names of all backends that this version knows, available or not."""
    return tuple(BACKENDS)


def check_available(name: str, argument: str) -> None:
    """Raises ValueError where no backend has that name, and BackendError where it can't run on this machine."""
    if check_name(name, argument) != "auto":
        reason = get(name).unavailable()
        if reason is not None:
            remedy = "Choose one of rf.available_backends(), or 'auto'."
            raise BackendError(f"{argument} is {name!r}, which is not available here: {reason}. {remedy}")


def check_name(name: str, argument: str) -> str:
    """`name` if it names a backend or is "auto"; raises ValueError that names the argument otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} is {name!r}; it must be 'auto' or one of {', '.join(map(repr, BACKENDS))}.")
    return name


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}.")
    module, attribute = BACKENDS[name]
    return getattr(importlib.import_module(module), attribute)()


def stock() -> Backend:
    """The backend that is stock PyTorch, which serves every problem."""
    return get(STOCK)


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, in the order in which the automatic choice asks them."""
    ordered = [*AUTOMATIC_ORDER, *(n for n in BACKENDS if n not in AUTOMATIC_ORDER)]
    return [name for name in ordered if get(name).unavailable() is None]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block, every op of this thread (or asyncio task) runs on the backend `name`; "auto" chooses by problem.

    Args:
        name: one of `rf.available_backends()`, or "auto".

    Raises:
        ValueError: no backend has that name.
        BackendError: the backend can't run on this machine; the message says why.
    """
    check_available(name, "name")
    with choosing(name):
        yield


@contextlib.contextmanager
def choosing(name: str) -> Iterator[None]:
    """Within the `with` block, `choice()` gives this name, which it gave before: elsewhere, or on another thread."""
    token = _context_choice.set(name)
    try:
        yield
    finally:
        _context_choice.reset(token)


@functools.cache
def environment_choice() -> str:
    return check_name(config.backend(), "RESNET_FUSED_BACKEND")


def choice(argument: str = "auto") -> str:
    """The backend's name by the order argument, context manager, environment; "auto" if none of them chose."""
    if argument != "auto":
        return argument
    return _context_choice.get() or environment_choice()


def freezer(device: torch.device) -> Backend:
    """The backend that has the operators of frozen models on a device.

    Raises:
        BackendError: there is none for such devices.
    """
    for name in (name for name in BACKENDS if name != STOCK and get(name).freezes):
        if {"cpu": False, "cuda": True}.get(device.type) == get(name).asks_for_gpu:
            return get(name)
    raise BackendError(f"no backend has a frozen form for {device.type}; freeze the model on the CPU or on a CUDA device.")


def candidates(problem: Problem) -> list[str]:
    """Backends that are available and can serve the problem, in automatic order, then the others."""
    ordered = [*AUTOMATIC_ORDER, *(n for n in BACKENDS if n not in AUTOMATIC_ORDER)]
    return [name for name in ordered if _refusal(get(name), problem) is None]


def _refusal(backend: Backend, problem: Problem) -> str | None:
    """Why the automatic choice can't take a backend for a problem; None if it can."""
    if freezing() and not backend.freezes:
        return "its kernels have no frozen form"
    # Where CUDA was asked for its devices, processes that are forked later can't use it. A CPU's problem needs no answer.
    if problem.device.type == "cpu" and backend.asks_for_gpu:
        return backend.why_not(problem) or backend.unavailable()
    return backend.unavailable() or backend.why_not(problem)


@functools.cache
def _log_once(message: str) -> None:
    config.logger().info(message)


def resolve(problem: Problem, chosen: str) -> Backend:
    """The backend that serves the problem.

    Raises:
        BackendError: `chosen` names a backend that can't serve it.
    """
    if chosen != "auto":
        backend = get(chosen)
        reason = backend.unavailable() or backend.why_not(problem)
        if reason is not None:
            raise BackendError(f"backend {chosen!r} can't serve {problem}: {reason}. Choose another backend, or 'auto'.")
        return backend
    recorded = tuning_cache.choice(problem)
    if recorded is not None and recorded.backend in BACKENDS:
        backend = get(recorded.backend)
        if _refusal(backend, problem) is None:
            return backend
    return by_rules(problem)


def by_rules(problem: Problem) -> Backend:
    """The backend that the automatic choice takes for the problem where nothing was recorded."""
    for name in AUTOMATIC_ORDER:
        backend = get(name)
        reason = _refusal(backend, problem)
        if reason is not None:
            _log_once(f"backend {name!r} was passed over for {problem.label} on {problem.device.type}: {reason}")
            continue
        if name == STOCK or (backend.preferred(problem) and tuning_cache.rejected(problem, name) is None):
            return backend
    raise AssertionError("the reference backend serves every problem")
