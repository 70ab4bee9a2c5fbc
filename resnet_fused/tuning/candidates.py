"""The candidates for a problem by their names: a backend, "backend:plan", or "parts" for a problem in its parts."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import ConvParameters, Declined, Kernel, Problem, candidates, get, stock
from resnet_fused.backends.binding import compose, is_divisible, rules
from resnet_fused.backends.tuning_cache import PARTS


def names(problem: Problem) -> list[str]:
    """All candidates that can serve the problem."""
    found = [name for backend in candidates(problem) for name in _names(backend, problem)]
    return [*found, PARTS] if is_divisible(problem) else found


def is_ready(name: str) -> bool:
    """Whether a candidate runs without being compiled first."""
    return name == PARTS or get(name.partition(":")[0]).ready


def by_rules(problem: Problem) -> str:
    """The candidate that the automatic choice takes where nothing was recorded."""
    backend = rules(problem)
    return backend if backend == PARTS else _names(backend, problem)[0]


def prepare(problem: Problem, parameters: ConvParameters, name: str) -> Kernel:
    """The kernel of a candidate, with stock's in its place where it declines, as a model has it."""
    if name == PARTS:
        kernel = compose(problem, parameters, "auto").kernel
    else:
        backend, _, plan = name.partition(":")
        kernel = get(backend).prepare(problem, parameters, plan or None)

    def with_stock(x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
        try:
            return kernel(x, residual, *more)
        except Declined:
            return stock().prepare(problem, parameters)(x, residual, *more)

    return with_stock


def _names(name: str, problem: Problem) -> list[str]:
    return [f"{name}:{plan}" for plan in get(name).plans(problem)] or [name]
