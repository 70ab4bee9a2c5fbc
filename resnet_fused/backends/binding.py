"""Binds a problem to a kernel: one backend's for all of its steps, or a composition of kernels for parts of them.

A program of several steps, such as a residual block, is covered by the longest parts that a backend serves in one piece, where
that is preferred. Each part is bound by the same choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

import torch

from resnet_fused.backends import (
    STOCK,
    Backend,
    BackendError,
    ConvParameters,
    JoinableKernel,
    Kernel,
    by_rules,
    candidates,
    first_call,
    get,
    resolve,
    stock,
    tuning_cache,
)
from resnet_fused.backends.implementation import in_its_format, in_turn
from resnet_fused.backends.problem import FIRST_RESULT, RESIDUAL, Conv, Epilogue, Pointwise, Problem, Step, X

_Override = Callable[[Problem, ConvParameters], Kernel | None]
_override: ContextVar[_Override | None] = ContextVar("resnet_fused_override", default=None)


@contextlib.contextmanager
def override_kernels(override: _Override) -> Iterator[None]:
    """Within the `with` block, `override` is asked first for the kernel of every problem that is left to the automatic choice.

    Where it gives None, the usual choice is made. Kernels that were bound before the block are bound again in it, and those
    bound in it aren't used after it.
    """
    token = _override.set(override)
    tuning_cache.forget()
    try:
        yield
    finally:
        _override.reset(token)
        tuning_cache.forget()


def overridden() -> bool:
    """Whether this is within `override_kernels`, where the kernels may be others at every call."""
    return _override.get() is not None


class Bound(NamedTuple):
    """A kernel for a problem.

    Attributes:
        kernel: the kernel.
        backend: name of the backend that made it; "onednn+reference" where the parts of a block differ.
        keeps_bounds: whether it is faster where values are known to be bounded (backends/bounds.py).
    """

    kernel: Kernel
    backend: str
    keeps_bounds: bool = False


class Part(NamedTuple):
    """A part of a problem: a problem itself, its parameters, and the numbers of the whole's values that it reads."""

    problem: Problem
    parameters: ConvParameters
    reads: tuple[int, ...]


def bind(problem: Problem, parameters: ConvParameters, chosen: str) -> Bound:
    """The kernel that computes `problem` with `parameters`, on the backend `chosen` or the best one ("auto").

    Raises:
        BackendError: `chosen` names a backend that can serve neither the problem nor its parts.
    """
    override = _override.get()
    kernel = override(problem, parameters) if override is not None and chosen == "auto" else None
    if kernel is not None:
        return Bound(kernel, "override")
    if not is_divisible(problem):
        if chosen == "auto":
            first_call.trial(problem, parameters)
        return _bind_one(problem, parameters, chosen)
    if chosen == "auto":
        first_call.trial(problem, parameters, lambda own: compose(problem, own, chosen).kernel)
    name = _backend_of_whole(problem, chosen)
    return compose(problem, parameters, chosen) if name == tuning_cache.PARTS else _prepared(get(name), problem, parameters)


def _bind_one(problem: Problem, parameters: ConvParameters, chosen: str) -> Bound:
    try:
        return _prepared(resolve(problem, chosen), problem, parameters)
    except BackendError:  # which is known only when it is tried, for cuDNN
        if chosen != "auto":
            raise
        return _prepared(stock(), problem, parameters)


def _prepared(backend: Backend, problem: Problem, parameters: ConvParameters) -> Bound:
    return Bound(backend.prepare(problem, parameters), backend.name, backend.keeps_bounds)


def bind_if_better(problem: Problem, parameters: ConvParameters, chosen: str) -> Bound | None:
    """As `bind`, for a layer that stock PyTorch computes as well; None where stock is as good, or `chosen` can't serve it."""
    try:
        bound = bind(problem, parameters, chosen)
    except BackendError:
        return None
    return None if bound.backend == STOCK else bound


# ---- programs -----------------------------------------------------------------------------------------------------------


def is_divisible(problem: Problem) -> bool:
    """Whether the problem is made of several steps, or of one with a pool, that kernels of their own can compute."""
    return len(problem.steps) > 1 or (problem.epilogue.pool is not None and problem.steps[0].operation != Pointwise.IDENTITY)


def rules(problem: Problem) -> str:
    """The backend that the automatic choice takes where nothing was recorded; `PARTS` for a problem in its parts."""
    if not is_divisible(problem):
        return by_rules(problem).name
    for name in candidates(problem):
        # Composed of its parts it computes what the reference does, with the best backend for each part.
        if name != STOCK and get(name).preferred(problem) and tuning_cache.rejected(problem, name) is None:
            return name
    return tuning_cache.PARTS


def _backend_of_whole(problem: Problem, chosen: str) -> str:
    """The backend that computes a divisible problem in one piece; `PARTS` for none."""
    if chosen != "auto":
        backend = get(chosen)
        serves = backend.unavailable() is None and backend.why_not(problem) is None
        return chosen if serves and backend.preferred(problem) else tuning_cache.PARTS
    recorded = tuning_cache.choice(problem)
    if recorded is not None and recorded.backend in (tuning_cache.PARTS, *candidates(problem)):
        return recorded.backend
    return rules(problem)


def compose(problem: Problem, parameters: ConvParameters, chosen: str) -> Bound:
    """The kernel of a divisible problem, made of its parts' kernels.

    Raises:
        BackendError: `chosen` names a backend that can't serve a part.
    """
    parts = _cover(problem, parameters, chosen)
    # Pools are stock's in every composition.
    bound = [
        bind(part.problem, part.parameters, chosen) if part.problem.convs else _prepared(stock(), part.problem, part.parameters)
        for part in parts
    ]
    names = sorted({one.backend for one, part in zip(bound, parts, strict=True) if part.problem.convs})
    if names == [STOCK]:
        return _prepared(stock(), problem, parameters)
    kernel = join([one.kernel for one in bound], [part.reads for part in parts])
    if problem.memory_format != torch.channels_last:
        composed = kernel
        kernel = in_its_format(lambda x, r: composed(x.contiguous(memory_format=torch.channels_last), r), problem)
    return Bound(kernel, "+".join(names), any(one.keeps_bounds for one in bound))


def join(kernels: Sequence[Kernel], reads: Sequence[tuple[int, ...]]) -> Kernel:
    """Kernels on numbered values as one: by one call of their library where it can, else one after the other."""
    own = type(kernels[0])
    if issubclass(own, JoinableKernel) and all(type(kernel) is own for kernel in kernels):
        return own.join(kernels, reads)
    return in_turn(kernels, reads)


def divided(problem: Problem, parameters: ConvParameters, chosen: str = "auto") -> list[Part]:
    """The single operations that a divisible problem is made of.

    Where a convolution without bias is a kernel of the backend's, as of cuDNN's, the bias of a projection shortcut is added
    with that of the convolution that adds the shortcut: a pass for it would take longer than the convolution.
    """
    # They work in channels_last, so that nothing is converted between them.
    inside = replace(problem, memory_format=torch.channels_last)
    shapes, moved = problem.shapes(), _moved_bias(inside, chosen)
    found: list[Part] = []
    numbers = [X, RESIDUAL]  # of the values, among those of the parts
    owned = 0
    for index, step in enumerate(problem.steps):
        own = parameters
        if isinstance(step.operation, Conv):
            own = parameters.part(owned)
            owned += 1
        reads = tuple(numbers[number] for number in step.reads)
        if moved is not None and index == moved:
            step = step._replace(epilogue=step.epilogue._replace(bias=False))
        elif moved is not None and step.epilogue.residual and step.reads[1] == FIRST_RESULT + moved:
            own = own.with_bias_of(parameters.part(moved))
        pool, shape = step.epilogue.pool, shapes[step.reads[0]]
        for each in (step,) if pool is None else (step._replace(epilogue=step.epilogue._replace(pool=None)), _pool_of(step)):
            alone = each._replace(reads=(X, RESIDUAL)[: len(reads)])
            part = replace(inside, steps=(alone,), shape=shape)
            found.append(Part(part, own, reads))
            reads, shape = (FIRST_RESULT + len(found) - 1,), part.output_shape()
        numbers.append(FIRST_RESULT + len(found) - 1)
    return found


def _pool_of(step: Step) -> Step:
    return Step(Pointwise.IDENTITY, Epilogue(pool=step.epilogue.pool))


def _moved_bias(problem: Problem, chosen: str) -> int | None:
    """Number of the step of a projection shortcut whose bias is added elsewhere; None where it stays."""
    block = problem.block()
    if block is None or block.shortcut is None or not problem.steps[0].epilogue.bias:
        return None
    first = problem.steps[0]
    bare = replace(problem, steps=(first._replace(epilogue=Epilogue(bias=False)),))
    names = candidates(bare) if chosen == "auto" else [chosen]
    for name in names:
        backend = get(name)
        if name != STOCK and backend.unavailable() is None and backend.why_not(bare) is None and backend.preferred(bare):
            return 0
    return None


def _cover(problem: Problem, parameters: ConvParameters, chosen: str) -> list[Part]:
    """Parts that make up a problem: from each step on the longest that a backend computes in one piece, or the step alone."""
    single = divided(problem, parameters, chosen)
    found: list[Part] = []
    numbers = {X: X, RESIDUAL: RESIDUAL}  # of the values that parts give, among those of the cover
    start = 0
    while start < len(single):
        part, length = single[start], 1
        for end in range(len(single), start + 1, -1):
            if end - start == len(single):
                continue  # the whole was asked for already
            longer = _joined(problem, single, start, end)
            if longer is not None and _backend_of_whole(longer.problem, chosen) != tuning_cache.PARTS:
                part, length = longer, end - start
                break
        numbers[FIRST_RESULT + start + length - 1] = FIRST_RESULT + len(found)
        found.append(part._replace(reads=tuple(numbers[number] for number in part.reads)))
        start += length
    return found


def _joined(problem: Problem, parts: Sequence[Part], start: int, end: int) -> Part | None:
    """Parts in a row as one; None where it would have more than one result, or read more than an input and a residual."""
    own = range(FIRST_RESULT + start, FIRST_RESULT + end)
    for later in parts[end:]:
        if any(number in own[:-1] for number in later.reads):
            return None
    sources = {part.reads[0] for part in parts[start:end]} - {*own}
    added = {number for part in parts[start:end] for number in part.reads[1:]} - {*own} - sources
    if len(sources) != 1 or len(added) > 1:
        return None
    (source,) = sources
    numbers = {source: X, **dict.fromkeys(added, RESIDUAL), **{n: FIRST_RESULT + i for i, n in enumerate(own)}}
    steps = []
    for part in parts[start:end]:
        (step,) = part.problem.steps
        steps.append(step._replace(reads=tuple(numbers[number] for number in part.reads)))
    with_weights = [part.parameters for part in parts[start:end] if part.problem.convs]
    whole = replace(parts[start].problem, steps=tuple(steps))
    return Part(whole, ConvParameters.joined(with_weights), (source, *added))
