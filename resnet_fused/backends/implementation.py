"""What a backend consists of: an ordered list of implementations, of which the first that serves a problem and pays runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import bounds, tuning_cache
from resnet_fused.backends.activation import activated
from resnet_fused.backends.parameters import ConvParameters
from resnet_fused.backends.problem import Activation, Epilogue, Kind, Problem

Kernel = Callable[..., Tensor]
"""A prepared problem: kernel(x, residual, *more) gives the result. `residual` is None unless the problem has one; `more` are
further inputs, of a problem that has some. May raise `Declined`."""


class Declined(Exception):
    """A kernel found at run time that it can't give stock's answer for these values; the caller runs stock's op instead."""


class BackendError(RuntimeError):
    """An explicitly chosen backend can't serve; the message says why and what to do."""


class JoinableKernel:
    """A kernel that runs as one with others, by one call of the backend's library."""

    def __call__(self, x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
        raise NotImplementedError

    def joins(self, other: Any) -> bool:
        """Whether another kernel can be joined with this one."""
        return type(other) is type(self)

    @classmethod
    def join(cls, kernels: Sequence[Any], reads: Sequence[tuple[int, ...]]) -> Kernel:
        """The kernels as one. `reads`: numbers of the values that each reads, as a problem's; the last one's is the result."""
        raise NotImplementedError

    @classmethod
    def run_of(
        cls, kernels: Sequence[Any], reads: Sequence[tuple[int, ...]], inputs: int, results: Sequence[int]
    ) -> Callable[..., Sequence[Tensor]]:
        """The kernels as one function of any number of inputs that gives any number of results.

        Args:
            kernels: in order.
            reads: numbers of the values that each reads: first the inputs, then the results of the kernels.
            inputs: how many inputs.
            results: numbers of the values that are given.
        """
        raise NotImplementedError


class Implementation:
    """One way to compute problems of some kinds.

    Attributes:
        name: as a developer would call it, such as "Winograd".
        kinds: what it computes.
    """

    name: str
    kinds: frozenset[Kind]

    def why_not(self, problem: Problem) -> str | None:
        """Why it can't serve a problem of its kinds; None if it can."""
        raise NotImplementedError

    def preferred(self, problem: Problem) -> bool:
        """Whether it is taken for a problem that it serves, and not one after it in the list that serves it too."""
        return True

    def plans(self, problem: Problem) -> list[str]:
        """Names of the ways to run it, the most promising first; empty if there is but one."""
        return []

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Any:
        """The kernel for a problem that it serves; of a batch norm the passes (`BatchNormPasses`).

        Packs weights through `parameters.pack`. Called once for each problem and parameters.

        Args:
            plan: one of `plans`; None, or a name that isn't one of them: the most promising one.

        Raises:
            BackendError: it can't serve the problem after all, which is known only when it is tried.
        """
        raise NotImplementedError


class Backend:
    """A backend: what all its implementations need, and the implementations in the order in which they are asked.

    Attributes:
        name: as users choose it.
        implementations: in order. One that serves more comes after one that is faster for what it serves.
        activations: the functions that its kernels apply. Others are a pass of stock's after them.
        asks_for_gpu: whether `unavailable` looks for a GPU. CPU tensors are then refused without a look.
        ready: whether its kernels run without being compiled first.
        keeps_bounds: whether its kernels are faster where values are known to be bounded (backends/bounds.py).
        freezes: whether its kernels have a frozen form (backends/freezing.py).
    """

    name: str
    implementations: tuple[Implementation, ...]
    activations: tuple[Activation, ...] = (Activation.NONE, Activation.RELU)
    asks_for_gpu = False
    ready = True
    keeps_bounds = False
    freezes = False

    def unavailable(self) -> str | None:
        """Why this backend can't run on this machine, with the remedy; None if it can."""
        raise NotImplementedError

    def frozen_input(self, x: Tensor, example: Tensor) -> Tensor:
        """An operator of a backend that `freezes`: a copy of x with the strides of `example`.

        Raises:
            ValueError: x has another shape or dtype than the example, or is on another device.
        """
        raise NotImplementedError

    def details(self) -> str:
        """What `resnet-fused info` tells of a backend that is available."""
        return ""

    def why_none(self, problem: Problem) -> str | None:
        """Why none of the implementations can serve the problem, whatever its kind; None if one may."""
        raise NotImplementedError

    def preferred(self, problem: Problem) -> bool:
        """Whether it was measured, or is known, to be no slower than the backends after it in the automatic order."""
        raise NotImplementedError

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend can't serve the problem; None if it can."""
        problem = self._without_pass(problem)
        kind = problem.kind
        own = [one for one in self.implementations if kind in one.kinds]
        if kind is Kind.PROGRAM and any(conv.dims != 2 for conv in problem.convs):
            own = [one for one in own if Kind.CONVOLUTION_ND in one.kinds]
        if not own:
            return f"it has no kernel for {problem.label}"
        for step in problem.steps:
            if step.epilogue.activation not in self.activations:
                return f"its epilogues don't have {step.epilogue.activation.value}"
        reason = self.why_none(problem)
        if reason is not None:
            return reason
        for one in own:
            reason = one.why_not(problem)
            if reason is None:
                return None
        return reason  # of the last one, which serves most

    def _without_pass(self, problem: Problem) -> Problem:
        """The problem without a function that this backend's kernels don't have, and that a pass after them applies."""
        epilogue = problem.epilogue
        if len(problem.steps) > 1 or epilogue.pool is not None or epilogue.activation in self.activations:
            return problem
        bare = epilogue._replace(activation=Activation.NONE, slope=0.0)
        return replace(problem, steps=(problem.steps[0]._replace(epilogue=bare),))

    def serving(self, problem: Problem) -> list[Implementation]:
        """The implementations that serve a problem: the one that is taken by rule, then the others in their order."""
        problem = self._without_pass(problem)
        kind = problem.kind
        found = [one for one in self.implementations if kind in one.kinds and one.why_not(problem) is None]
        first = next((one for one in found if one.preferred(problem)), found[-1])
        return [first, *(one for one in found if one is not first)]

    def plans(self, problem: Problem) -> list[str]:
        """Names of the ways to compute a problem that it serves, the most promising first; empty where there is no choice."""
        found = [name for one in self.serving(problem) for name in one.plans(problem)]
        return found if len(found) > 1 else []

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None = None) -> Any:
        """The kernel for a problem that it serves.

        Args:
            plan: one of `plans`; None: the recorded one, or the most promising one.

        Raises:
            BackendError: no implementation can serve it after all.
        """
        bare = self._without_pass(problem)
        if bare != problem:
            return _with_pass(self.prepare(bare, parameters, plan), problem.epilogue)
        serving = self.serving(problem)
        by_plan = {name: one for one in serving for name in one.plans(problem)}
        named = plan or (tuning_cache.plan(problem, self.name) if by_plan else None)
        if named in by_plan:
            return by_plan[named].prepare(problem, parameters, named)
        for one in serving[:-1]:
            try:
                return one.prepare(problem, parameters, named)
            except BackendError:
                continue
        return serving[-1].prepare(problem, parameters, named)


def _with_pass(kernel: Kernel, epilogue: Epilogue) -> Kernel:
    """A kernel with the epilogue's function in a pass after it."""

    def run(x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
        y = activated(kernel(x, residual, *more), epilogue, inplace=True)
        bounds.tell(y, torch.inf)  # what was told of it before may hold no more
        return y

    return run


def in_its_format(kernel: Kernel, problem: Problem) -> Kernel:
    """A kernel that gives a channels_last result, with the result in the problem's format."""
    if problem.memory_format == torch.channels_last:
        return kernel
    return lambda x, residual, *more: kernel(x, residual, *more).contiguous(memory_format=problem.memory_format)


def in_turn(kernels: Sequence[Kernel], reads: Sequence[tuple[int, ...]]) -> Kernel:
    """Kernels one after the other on numbered values, as one; `reads` are those of each kernel, the last gives the result."""
    last = {number: i for i, numbers in enumerate(reads) for number in numbers}
    frees = [tuple(number for number, at in last.items() if at == i) for i in range(len(kernels))]

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        values: list[Any] = [x, residual]
        for run, (source, *added), freed in zip(kernels, reads, frees, strict=True):
            values.append(run(values[source], values[added[0]] if added else None))
            for number in freed:
                values[number] = None
        return values[-1]

    return kernel
