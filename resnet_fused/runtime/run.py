"""A program's kernels for one kind of input, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resnet_fused.backends import ConvParameters, Declined, JoinableKernel, Kernel, Problem, bounds
from resnet_fused.backends.binding import Bound, join
from resnet_fused.backends.problem import FIRST_RESULT, X
from resnet_fused.runtime.program import Program, Value, fill
from resnet_fused.runtime.replay import Replay, replayable
from resnet_fused.runtime.views import View, in_view


@dataclass
class Operation:
    """What a run does in one go: values[writes] = run(*values of reads); then `frees` aren't needed any more.

    `joinable`: the kernel, where it can be joined with the next one's. `plain`: the same in stock's ops, for values that a
    kernel declines. `view`: in which the kernel sees its values.
    """

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    joinable: JoinableKernel | None = None
    plain: Callable[..., Any] | None = None
    view: View = View.SAME
    frees: list[int] = field(default_factory=list)


class Run:
    """A program's kernels for one kind of input.

    Attributes:
        problems: by the number of a fused step, its problem and the name of the backend that serves it.
        parameters: of the fused steps, with what was packed for their kernels; kept as long as the run.
        unequal: numbers of steps whose residual isn't as what it is added to, which run as stock.
        declined: how often in a row kernels left values to stock's ops.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.problems: dict[int, tuple[Problem, str]] = {}
        self.parameters: list[ConvParameters] = []
        self.unequal: list[int] = []
        self.declined = 0
        self.operations: list[Operation] = []
        self._count = 0
        self._single = type(program.outputs) is Value
        self._bounded = False
        self.replay: Replay | None = None

    def note_kernel(self, number: int, problem: Problem, bound: Bound, parameters: ConvParameters) -> None:
        """Notes what serves a step."""
        self.problems[number] = problem, bound.backend
        self.parameters.append(parameters)
        self._bounded = self._bounded or bound.keeps_bounds

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        values = self._values(inputs) if self.replay is None else self.replay(inputs)
        if self._single:
            return values[self.program.outputs.number]
        return fill(self.program.outputs, values.__getitem__)

    def _values(self, inputs: Sequence[Tensor]) -> list[Any]:
        if not self._bounded:
            return self._run({}, inputs)
        with bounds.within_a_call() as known:
            return self._run(known, inputs)

    def _run(self, known: dict[Any, Any], inputs: Sequence[Tensor]) -> list[Any]:
        values: list[Any] = [*inputs, *(None,) * (self._count - len(inputs))]
        declined = False
        for operation in self.operations:
            given = [values[number] for number in operation.reads]
            if operation.plain is None:
                known.clear()  # no kernel: it may write to what it gets
            try:
                result = operation.run(*given)
            except Declined:
                assert operation.plain is not None
                result, declined = operation.plain(*given), True
            for number in operation.writes:
                values[number] = result
            for number in operation.frees:
                values[number] = None
        self.declined = self.declined + 1 if declined else 0
        return values

    def may_replay(self, inputs: Sequence[Tensor], kept: set[int], held: Sequence[Tensor]) -> None:
        """Lets the run become a CUDA graph, if it can; arguments as a `Replay`'s."""
        if replayable(inputs, len(self.operations)):
            self.replay = Replay(self._values, kept, held)

    def finish(self, operations: list[Operation], kept: set[int], count: int) -> None:
        """Joins kernels in a row and notes from when on values aren't needed.

        Args:
            operations: what the first call did.
            kept: values of the result.
            count: of values.
        """
        self._count = count
        readers: dict[int, int] = {}
        for operation in operations:
            for number in operation.reads:
                readers[number] = readers.get(number, 0) + 1
        joined: list[list[Operation]] = []
        for operation in operations:
            before = joined[-1][-1] if joined else None
            follows = (
                before is not None
                and before.joinable is not None
                and operation.joinable is not None
                and operation.view is before.view
                and operation.reads == before.writes
                and readers[before.writes[0]] == 1
                and before.writes[0] not in kept
            )
            if follows:
                joined[-1].append(operation)
            else:
                joined.append([operation])
        self.operations = [_join(row) for row in joined]
        last: dict[int, Operation] = {}
        for operation in self.operations:
            for number in (*operation.reads, *operation.writes):
                last[number] = operation
        for number, operation in last.items():
            if number not in kept and number >= self.program.inputs:
                operation.frees.append(number)


def _join(row: list[Operation]) -> Operation:
    if len(row) == 1:
        return row[0]
    kernels = [operation.joinable for operation in row if operation.joinable is not None]
    joined = join(kernels, [(X if i == 0 else FIRST_RESULT + i - 1,) for i in range(len(kernels))])
    joined = in_view(joined, row[0].view)

    def plain(x: Tensor) -> Tensor:
        for operation in row:
            assert operation.plain is not None
            x = operation.plain(x)
        return x

    return Operation(without_residual(joined), row[0].reads, row[-1].writes, plain=plain)


def without_residual(kernel: Kernel) -> Callable[[Tensor], Tensor]:
    return lambda x: kernel(x, None)
