"""The registry of backends, and the choice of one for a problem.

A backend is an object with the methods of `Backend`. Its choice follows, in this order: the argument, `use_backend`,
the environment's RESNET_FUSED_BACKEND, automatic. An explicit choice that can't serve raises `BackendError` with the
reason; the automatic one takes what `rf.tune` recorded, else the first backend of `_AUTOMATIC_ORDER` that serves the
problem and is known to win it, and ends with the reference, which is stock PyTorch and serves everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from resnet_fused import config
from resnet_fused.backends import records
from resnet_fused.backends.problem import Conv, Folded, Pool, Precision, Problem

__all__ = [
    "Backend",
    "BackendError",
    "Conv",
    "Declined",
    "Folded",
    "Kernel",
    "Pool",
    "Precision",
    "Problem",
    "available_backends",
    "by_rules",
    "candidates",
    "check_available",
    "choice",
    "choosing",
    "get",
    "names",
    "resolve",
    "use_backend",
]

Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""A prepared problem: kernel(x, residual) gives the result. `residual` is None unless the op adds one. May raise `Declined`."""


class Backend(Protocol):
    """What a backend provides.

    One whose `unavailable` asks for a GPU has the attribute `asks_for_gpu`, and `unsupported` then refuses CPU tensors first.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend can't run on this machine, with the remedy; None if it can."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend can't serve the problem; None if it can."""

    def wins(self, problem: Problem) -> bool:
        """Whether it was measured, or is known, to be no slower than the backends behind it in the automatic order."""

    def prepare(self, problem: Problem, folded: Folded) -> Kernel:
        """The kernel for the problem. Packs weights through `folded.pack`; called once per problem and weights."""


class Declined(Exception):
    """A kernel found at run time that it can't give stock's answer for these values; the caller runs stock's op instead."""


class BackendError(RuntimeError):
    """An explicitly chosen backend can't serve; the message says why and what to do."""


# Module and class of each backend; the module is imported when the backend is first asked for.
_BACKENDS: dict[str, tuple[str, str]] = {
    "reference": ("resnet_fused.backends.reference", "Reference"),
    "onednn": ("resnet_fused.backends.onednn", "OneDNN"),
    "cpu": ("resnet_fused.backends.cpu", "CPU"),
    "cuda": ("resnet_fused.backends.cuda", "CUDA"),
    "triton": ("resnet_fused.backends.triton.backend", "Triton"),
    "cudnn": ("resnet_fused.backends.cudnn", "CuDNN"),
}

_AUTOMATIC_ORDER = ("cpu", "onednn", "cudnn", "cuda", "reference")

_context_choice: ContextVar[str | None] = ContextVar("resnet_fused_backend", default=None)


def names() -> tuple[str, ...]:
    """Names of all backends that this version knows, available or not."""
    return tuple(_BACKENDS)


def check_available(name: str, argument: str) -> None:
    """Raises ValueError where no backend has that name, and BackendError where it can't run on this machine."""
    if check_name(name, argument) != "auto":
        reason = get(name).unavailable()
        if reason is not None:
            remedy = "Choose one of rf.available_backends(), or 'auto'."
            raise BackendError(f"{argument} is {name!r}, which is not available here: {reason}. {remedy}")


def check_name(name: str, argument: str) -> str:
    """`name` if it names a backend or is "auto"; raises ValueError that names the argument otherwise."""
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"{argument} is {name!r}; it must be 'auto' or one of {', '.join(map(repr, _BACKENDS))}.")
    return name


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown name."""
    if name not in _BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(map(repr, _BACKENDS))}.")
    module, attribute = _BACKENDS[name]
    return getattr(importlib.import_module(module), attribute)()


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, in the order in which the automatic choice asks them."""
    ordered = [*_AUTOMATIC_ORDER, *(n for n in _BACKENDS if n not in _AUTOMATIC_ORDER)]
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
def _environment_choice() -> str:
    return check_name(config.backend(), "RESNET_FUSED_BACKEND")


def choice(argument: str = "auto") -> str:
    """The backend's name by the order argument, context manager, environment; "auto" if none of them chose."""
    if argument != "auto":
        return argument
    return _context_choice.get() or _environment_choice()


def candidates(problem: Problem) -> list[str]:
    """Backends that are available and can serve the problem, in automatic order, then the others."""
    ordered = [*_AUTOMATIC_ORDER, *(n for n in _BACKENDS if n not in _AUTOMATIC_ORDER)]
    return [name for name in ordered if _refusal(get(name), problem) is None]


def _refusal(backend: Backend, problem: Problem) -> str | None:
    """Why the automatic choice can't take a backend for a problem; None if it can."""
    # Where CUDA was asked for its devices, processes that are forked later can't use it. A CPU's problem needs no answer.
    if problem.device.type == "cpu" and getattr(backend, "asks_for_gpu", False):
        return backend.unsupported(problem) or backend.unavailable()
    return backend.unavailable() or backend.unsupported(problem)


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
        reason = backend.unavailable() or backend.unsupported(problem)
        if reason is not None:
            raise BackendError(f"backend {chosen!r} can't serve {problem}: {reason}. Choose another backend, or 'auto'.")
        return backend
    recorded = records.choice(problem)
    if recorded is not None and recorded.backend in _BACKENDS:
        backend = get(recorded.backend)
        if _refusal(backend, problem) is None:
            return backend
    return by_rules(problem)


def by_rules(problem: Problem) -> Backend:
    """The backend that the automatic choice takes for the problem where nothing was recorded."""
    for name in _AUTOMATIC_ORDER:
        backend = get(name)
        reason = _refusal(backend, problem)
        if reason is not None:
            _log_once(f"backend {name!r} was passed over for {problem.op} on {problem.device.type}: {reason}")
            continue
        if name == "reference" or (backend.wins(problem) and records.rejected(problem, name) is None):
            return backend
    raise AssertionError("the reference backend serves every problem")
