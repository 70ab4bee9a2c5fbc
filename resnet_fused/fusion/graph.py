"""A program as it stands in graphs of torch.compile, torch.export and torch.jit.trace: registered operators and plain calls.

An operator takes the parameters themselves, as they are in the module, and keeps what it packed from them: a graph has nothing
that could become stale, and its state dict is stock's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion.building import Built
from resnet_fused.runtime.executor import Settings
from resnet_fused.runtime.program import NONE, Call, FusedStep, Program, Value, fill, to_text


@dataclass(frozen=True)
class _Segment:
    """Steps in a row as one operator: values[outputs] = program(values[inputs], parameters, text)."""

    text: str
    parameters: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class _Plain:
    """A call of something that isn't fused, whose result is values[output]."""

    call: Call
    output: int


class GraphProgram:
    """What a fast path puts into a graph.

    Attributes:
        inputs: number of the forward's arguments.
    """

    def __init__(self, module: nn.Module, built: Built, items: list[_Segment | _Plain], settings: Settings) -> None:
        self.inputs = built.program.inputs
        self.items = items
        self.outputs = built.program.outputs
        self.precision, self.backend = settings.precision, settings.backend
        self.dims = {2 + match.layer.conv.dims for group in built.groups.values() for match in group.convolutions}
        self.modes = [(path, submodule(module, path).training) for path in built.absorbed]

    @classmethod
    def of(cls, module: nn.Module, built: Built, settings: Settings) -> GraphProgram:
        program = built.program
        items: list[_Segment | _Plain] = []
        row: list[tuple[int, FusedStep]] = []
        needed = _last_reads(program.items, program.inputs, program.outputs)
        free = program.inputs + len(program.items)  # numbers from there on are those of values inside of steps
        for index, item in enumerate(program.items):
            number = program.inputs + index
            if isinstance(item, FusedStep) and not _computes_weights(item, built):
                row.append((number, item))
                continue
            if row:
                items.append(_segment(row, built.parameters, needed))
                row = []
            if isinstance(item, Call):
                items.append(_Plain(item, number))
                continue
            # A weight that is computed in the graph would be another one, for the operator, at every call.
            calls = _plain(program.plain[number], item.reads, number, free)
            free += len(calls)
            items += calls
        if row:
            items.append(_segment(row, built.parameters, needed))
        return cls(module, built, items, settings)

    def holds_for(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the module is in the mode, and called in the way, that the program is for."""
        grad = torch.is_grad_enabled()
        if len(self.dims) > 1:
            return False
        for x in args:
            if not isinstance(x, Tensor) or x.dim() not in self.dims or (grad and x.requires_grad):
                return False
        for path, training in self.modes:
            if submodule(module, path).training is not training:
                return False
        if grad:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    return False
        return not torch._C._is_any_autocast_enabled()

    def run(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        values: dict[int, Any] = dict(enumerate(args))
        for item in self.items:
            if isinstance(item, _Segment):
                parameters = [_get(module, path) for path in item.parameters]
                inputs = [values[number] for number in item.inputs]
                results = torch.ops.resnet_fused.program.default(inputs, parameters, item.text, self.precision, self.backend)
                for number, result in zip(item.outputs, results):  # noqa: B905 — Dynamo knows no strict zip of old
                    values[number] = result
            else:
                values[item.output] = run_call(item.call, module, values)
        return fill(self.outputs, values.__getitem__)


def _computes_weights(step: FusedStep, built: Built) -> bool:
    return any(built.parameters[n] in built.derived for layer in step.layers for n in layer.tensors if n != NONE)


def _plain(step: Program, reads: tuple[int, ...], number: int, free: int) -> list[_Plain]:
    """A step as the calls that it was made of.

    Args:
        step: these calls, on values of their own.
        reads: numbers of what the step reads.
        number: of the step's value.
        free: the first number that no value has.
    """
    numbers = [*reads, *range(free, free + len(step.items))]
    numbers[step.outputs.number] = number
    made: list[_Plain] = []
    for own, call in enumerate(step.items, step.inputs):
        assert isinstance(call, Call)
        args, kwargs = (fill(given, lambda n: Value(numbers[n])) for given in (call.args, call.kwargs))
        renumbered = call._replace(args=args, kwargs=kwargs, reads=tuple(numbers[n] for n in call.reads))
        made.append(_Plain(renumbered, numbers[own]))
    return made


def _last_reads(items: tuple[FusedStep | Call, ...], inputs: int, outputs: Any) -> dict[int, int]:
    """By value, the number of the last value that is made of it; one beyond all where it is a result."""
    last: dict[int, int] = {}
    for index, item in enumerate(items):
        last.update(dict.fromkeys(item.reads, inputs + index))

    def result(number: int) -> None:
        last[number] = inputs + len(items)

    fill(outputs, result)
    return last


def _segment(row: list[tuple[int, FusedStep]], paths: list[str], last: dict[int, int]) -> _Segment:
    first, end = row[0][0], row[-1][0]
    inputs: list[int] = []
    for _, step in row:
        inputs += [n for n in step.reads if n < first and n not in inputs]
    own = {number: i for i, number in enumerate(inputs)} | {n: len(inputs) + i for i, (n, _) in enumerate(row)}
    used: dict[int, int] = {}
    steps = []
    for _, step in row:
        layers = []
        for layer in step.layers:
            tensors = tuple(n if n == NONE else used.setdefault(n, len(used)) for n in layer.tensors)
            layers.append(layer._replace(tensors=tensors))
        residual = NONE if step.residual == NONE else own[step.residual]
        more = tuple(own[number] for number in step.more)
        steps.append(step._replace(layers=tuple(layers), x=own[step.x], residual=residual, more=more))
    outputs = tuple(number for number, _ in row if last.get(number, NONE) > end)
    return _Segment(
        to_text(len(inputs), steps, [own[n] for n in outputs]), tuple(paths[n] for n in used), tuple(inputs), outputs
    )


def submodule(module: nn.Module, path: str) -> nn.Module:
    """As `module.get_submodule`, which looks at more, for a path that there is."""
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _get(module: nn.Module, path: str) -> Tensor:
    *owners, name = path.split(".")
    for owner in owners:
        module = module._modules[owner]  # type: ignore[assignment]
    return getattr(module, name)


def run_call(call: Call, module: nn.Module, values: dict[int, Any] | list[Any]) -> Any:
    """Calls what a call says, on values by their numbers."""
    if call.kind == "get_attr":
        return _get(module, call.target)
    args, kwargs = fill(call.args, values.__getitem__), fill(call.kwargs, values.__getitem__)
    if call.kind == "call_module":
        return submodule(module, call.target)(*args, **kwargs)
    if call.kind == "call_method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return call.target(*args, **kwargs)
