"""A program's kernels for one kind of input, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resnet_fused.backends import ConvParameters, Declined, JoinableKernel, Kernel, Problem, bounds
from resnet_fused.backends.binding import Bound
from resnet_fused.runtime.program import Program, Value, fill
from resnet_fused.runtime.replay import Replay, replayable
from resnet_fused.runtime.views import View, all_in_view


@dataclass
class Operation:
    """What a run does in one go: values[writes] = run(*values of reads); then `frees` aren't needed any more.

    `joinable`: the kernel, where it can be joined with the next one's. `plain`: the same in stock's ops, for values that a
    kernel declines. `view`: in which the kernel sees its values. `several`: whether there is a result for each of `writes`, and
    not one for all.
    """

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    joinable: JoinableKernel | None = None
    plain: Callable[..., Any] | None = None
    view: View = View.SAME
    several: bool = False
    frees: list[int] = field(default_factory=list)


class Run:
    """A program's kernels for one kind of input.

    Attributes:
        problems: by the number of a fused step, its problem and the name of the backend that serves it.
        parameters: of the fused steps, with what was packed for their kernels; kept as long as the run.
        unequal: numbers of steps whose residual isn't as what it is added to, which run as stock.
        constants: by the numbers of values, those that are the same in every call: sizes, and what is computed with them.
        declined: how often in a row kernels left values to stock's ops.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.problems: dict[int, tuple[Problem, str]] = {}
        self.parameters: list[ConvParameters] = []
        self.unequal: list[int] = []
        self.constants: dict[int, Any] = {}
        self.declined = 0
        self.operations: list[Operation] = []
        self._others: list[Any] = []  # values that aren't inputs, as they are before a call
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
        values: list[Any] = [*inputs, *self._others]
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
            if operation.several:
                for number, own in zip(operation.writes, result, strict=True):
                    values[number] = own
            else:
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
        self._others = [self.constants.get(number) for number in range(self.program.inputs, count)]
        readers: dict[int, list[Operation]] = {}
        for operation in operations:
            for number in operation.reads:
                readers.setdefault(number, []).append(operation)
        rows: list[list[Operation]] = []
        for operation in operations:
            before = rows[-1][-1] if rows else None
            if before is not None and _joins(before, operation):
                rows[-1].append(operation)
            else:
                rows.append([operation])
        self.operations = [_join(row, kept, readers) for row in rows]
        last: dict[int, Operation] = {}
        for operation in self.operations:
            for number in (*operation.reads, *operation.writes):
                last[number] = operation
        for number, operation in last.items():
            if number not in kept and number >= self.program.inputs:
                operation.frees.append(number)


def _joins(before: Operation, operation: Operation) -> bool:
    """Whether an operation's kernel can be joined with that of the one before."""
    joinable, own = before.joinable, operation.joinable
    return joinable is not None and own is not None and before.view is operation.view and joinable.joins(own)


def _join(row: list[Operation], kept: set[int], readers: dict[int, list[Operation]]) -> Operation:
    """Operations in a row, whose kernels can be joined, as one."""
    if len(row) == 1:
        return row[0]
    made = [number for operation in row for number in operation.writes]
    inputs = [*dict.fromkeys(n for operation in row for n in operation.reads if n not in made)]
    inside = {*map(id, row)}
    needed = [n for n in made if n in kept or any(id(reader) not in inside for reader in readers.get(n, ()))] or made[-1:]
    numbers = {number: i for i, number in enumerate((*inputs, *made))}
    reads = [tuple(numbers[n] for n in operation.reads) for operation in row]
    kernels = [operation.joinable for operation in row if operation.joinable is not None]
    run = all_in_view(kernels[0].run_of(kernels, reads, len(inputs), [numbers[n] for n in needed]), row[0].view)

    def plain(*given: Tensor) -> list[Tensor]:
        values = dict(zip(inputs, given, strict=True))
        for operation in row:
            assert operation.plain is not None
            values[operation.writes[0]] = operation.plain(*[values[n] for n in operation.reads])
        return [values[n] for n in needed]

    return Operation(run, tuple(inputs), tuple(needed), plain=plain, several=True)


def without_residual(kernel: Kernel) -> Callable[..., Tensor]:
    return lambda x, *more: kernel(x, None, *more)
