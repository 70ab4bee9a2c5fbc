"""The candidates for a problem by their names: a backend, "backend:variant", or "parts" for a whole op in its parts."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import Declined, Kernel, candidates, get, records
from resnet_fused.backends.binding import compose, is_whole, rules
from resnet_fused.backends.problem import Folded, Problem

STOCK = "reference"


def names(problem: Problem) -> list[str]:
    """All candidates that can serve the problem."""
    found = [name for backend in candidates(problem) for name in _names(backend, problem)]
    return [*found, records.PARTS] if is_whole(problem) else found


def by_rules(problem: Problem) -> str:
    """The candidate that the automatic choice takes where nothing was recorded."""
    backend = rules(problem)
    return backend if backend == records.PARTS else _names(backend, problem)[0]


def prepare(problem: Problem, folded: Folded, name: str) -> Kernel:
    """The kernel of a candidate, with stock's in its place where it declines, as a model has it."""
    if name == records.PARTS:
        kernel = compose(problem, folded, "auto").kernel
    else:
        backend, _, variant = name.partition(":")
        arguments = (problem, folded, variant) if variant else (problem, folded)
        kernel = get(backend).prepare(*arguments)

    def served(x: Tensor, residual: Tensor | None) -> Tensor:
        try:
            return kernel(x, residual)
        except Declined:
            return get(STOCK).prepare(problem, folded)(x, residual)

    return served


def _names(name: str, problem: Problem) -> list[str]:
    backend = get(name)
    variants = backend.variants(problem) if hasattr(backend, "variants") else []
    return [f"{name}:{variant}" for variant in variants] or [name]
