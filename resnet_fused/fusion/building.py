"""Makes a program of a trace: the groups that were matched as steps, everything else as calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fused.fusion.derived import Derived
from resnet_fused.fusion.matches import ConvMatch, Group, Match
from resnet_fused.fusion.matching import Matcher
from resnet_fused.fusion.results import is_new, is_repeatable
from resnet_fused.fusion.tracing import CannotTrace, Trace, is_layer, trace
from resnet_fused.runtime.executor import CONCATENATIONS
from resnet_fused.runtime.layers import mean_of
from resnet_fused.runtime.program import NONE, Call, FusedStep, Layer, Program, Value

# Layers and functions that compute the same of either memory format, and whose result has that of their input.
_ELEMENTWISE_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.GELU, nn.Mish, nn.Tanh, nn.ELU),
    *(nn.Identity, nn.Dropout),
)
_TRANSPARENT_LAYERS = (
    *(
        *_ELEMENTWISE_LAYERS,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.BatchNorm2d,
        nn.GroupNorm,
        nn.Dropout2d,
        nn.Upsample,
        nn.ConstantPad2d,
    ),
)
_ELEMENTWISE_FUNCTIONS = {
    *(F.relu, torch.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, torch.sigmoid, torch.tanh),
    *(operator.add, torch.add, operator.mul, torch.mul, operator.iadd, operator.imul),
}
_TRANSPARENT_FUNCTIONS = {*_ELEMENTWISE_FUNCTIONS, *CONCATENATIONS, F.max_pool2d, F.avg_pool2d, F.interpolate, F.group_norm}
_ELEMENTWISE_METHODS = {"relu", "sigmoid", "add", "mul", "add_", "mul_", "relu_"}
_TRANSPARENT_METHODS = {*_ELEMENTWISE_METHODS, "mean", "dim"}


@dataclass
class Built:
    """The program of a module's forward, and what it was made from.

    Attributes:
        program: the program.
        parameters: names of the tensors that its layers' `tensors` number: paths in the module, or of `derived` ones.
        absorbed: paths of the modules whose own call the program replaces.
        trace: the trace.
        derived: by name, tensors that are computed from parameters.
        groups: by the number of a step's value, what it computes.
        reasons: why convolutions are in no step, by their names.
    """

    program: Program
    parameters: list[str]
    absorbed: list[str]
    trace: Trace
    derived: dict[str, Derived] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def build(module: nn.Module, alone: frozenset[str] = frozenset(), inputs: Sequence[Tensor] | None = None) -> Built:
    """The program of a module's forward. `alone`: as `Matcher` takes it; `inputs`: as `trace` does.

    Raises:
        CannotTrace: the forward can't be traced, or replaying it could have another effect; the message is the reason.
    """
    with torch.no_grad():
        found = trace(module, inputs)
        matcher = Matcher(module, found.graph, alone)
    try:
        return _Builder(module, found, matcher).build()
    except CannotTrace as reason:
        reason.by_size = found.by_size
        raise


class _Builder:
    def __init__(self, module: nn.Module, found: Trace, matcher: Matcher) -> None:
        self.module, self.trace, self.matcher = module, found, matcher
        self.numbers: dict[fx.Node, int] = {}
        self.parameters: dict[str, int] = {}

    def build(self) -> Built:
        matcher, nodes = self.matcher, list(self.trace.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.numbers.update((node, i) for i, node in enumerate(inputs))
        groups = {group.position: group for group in matcher.groups}
        if not groups:
            return Built(Program(0, (), None), [], [], self.trace, reasons=matcher.reasons)
        covered = {node for group in matcher.groups for match in group.matches for node in match.covered}
        identities = {node for node in nodes if matcher.is_identity(node)}
        unread = self._unread(covered)
        items: list[FusedStep | Call] = []
        made: dict[int, Group] = {}
        absorbed: list[str] = []
        for node in nodes:
            group = groups.get(node)
            if group is not None:
                number = len(inputs) + len(items)
                items.append(self._step(group))
                self.numbers[group.last] = number
                made[number] = group
                absorbed += [str(n.target) for match in group.matches for n in match.covered if n.op == "call_module"]
            elif node in identities:
                absorbed.append(str(node.target))
            elif node not in covered and node.op not in ("placeholder", "output"):
                # What nobody reads is called all the same: it may raise, or move running statistics.
                if node in unread:
                    continue
                if matcher.may_write(node) and self._writes_input(node):
                    raise CannotTrace(f"forward of {type(self.module).__name__} writes into its input")
                call = self._call(node, self._number)
                self.numbers[node] = len(inputs) + len(items)
                items.append(call)
                if call.fast and node.op == "call_module":
                    absorbed.append(str(node.target))
                    for name, parameter in self.module.get_submodule(str(node.target))._parameters.items():
                        if parameter is not None:
                            self._parameter(f"{node.target}.{name}")
        plain = {number: self._plain(group) for number, group in made.items()}
        outputs = template(self.trace.structure, self._number)
        program = Program(len(inputs), tuple(items), outputs, plain, self.trace.assumes_batches)
        names = [*dict.fromkeys([*self.trace.inlined, *absorbed])]
        derived = {name: tensor for name, tensor in matcher.tensors.derived.items() if name in self.parameters}
        return Built(program, [*self.parameters], names, self.trace, derived, made, matcher.reasons)

    def _unread(self, covered: set[fx.Node]) -> set[fx.Node]:
        """Parameters, and what is derived from them, that only steps read, which have them otherwise."""
        parts = {node for tensor in self.matcher.tensors.derived.values() for node in tensor.nodes}
        found: set[fx.Node] = set()
        for node in reversed(self.trace.graph.nodes):
            if (node.op == "get_attr" or node in parts) and all(user in covered or user in found for user in node.users):
                found.add(node)
        return found

    def _writes_input(self, node: fx.Node) -> bool:
        """Whether what a node writes to may be the memory of an input: then it couldn't be begun twice."""
        source = node.kwargs.get("out", node.args[0] if node.args else None)
        while isinstance(source, fx.Node):
            matcher = self.matcher
            if source in {match.last for match in matcher.matches} | {u.scaled[-1] for u in matcher.convolutions}:
                return False
            if source.op == "placeholder" or not source.args:
                return True
            if is_new(source):
                return False
            if source.op == "call_module" and not self.matcher.has_inplace(source):
                called = self.module.get_submodule(str(source.target))
                if is_layer(called) and not isinstance(
                    called, (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten)
                ):
                    return False
            source = source.args[0]
        return True

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, group: Group) -> FusedStep:
        layers = tuple(map(self._layer, group.matches, group.reads))
        residual = NONE if group.residual is None else self._number(group.residual)
        return FusedStep(layers, self._number(group.input), residual, tuple(map(self._number, group.matches[0].more)))

    def _plain(self, group: Group) -> Program:
        """What a step replaces, as calls on the values that it reads."""
        inputs = [self.matcher.producer(node) for node in group.inputs]
        numbers = {node: i for i, node in enumerate(inputs)}
        calls: list[Call] = []

        def number(node: fx.Node) -> int:
            node = self.matcher.producer(node)
            if node not in numbers:  # a parameter, or what is derived from parameters
                call(node)
            return numbers[node]

        def call(node: fx.Node) -> None:
            made = self._call(node, number)
            numbers[node] = len(inputs) + len(calls)
            calls.append(made)

        for node in sorted({n for match in group.matches for n in match.covered}, key=self.matcher.order.__getitem__):
            call(node)
        return Program(len(inputs), tuple(calls), Value(numbers[group.last]))

    def _layer(self, match: Match, reads: tuple[int, ...]) -> Layer:
        layer, norm = (match.layer if isinstance(match, ConvMatch) else None), match.norm
        weight, bias = (None, None) if layer is None else (layer.weight, layer.bias)
        pad, pad_mode = ((), "constant") if layer is None else (layer.pad, layer.pad_mode)
        of_norm = (None,) * 5 if norm is None else (norm.mean, norm.var, norm.gamma, norm.beta, norm.steps)
        tensors = tuple(NONE if name is None else self._parameter(name) for name in (weight, bias, *of_norm))
        eps, promotes = (0.0, False) if norm is None else (norm.eps, norm.promotes)
        return Layer(match.operation, pad, pad_mode, eps, tensors, promotes, match.renews, match.epilogue, reads)

    def _parameter(self, path: str) -> int:
        return self.parameters.setdefault(path, len(self.parameters))

    def _number(self, node: fx.Node) -> int:
        while node not in self.numbers and self.matcher.is_identity(node):
            node = node.args[0]  # type: ignore[assignment]
        return self.numbers[node]

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node, number: Callable[[fx.Node], int]) -> Call:
        """A node as a call on values, of which `number` gives the numbers."""
        args, kwargs = template(tuple(node.args), number), template(dict(node.kwargs), number)
        reads = tuple(dict.fromkeys(number(source) for source in node.all_input_nodes))
        transparent, elementwise = self._is_transparent(node), self._is_elementwise(node)
        pure, writes = self._is_pure(node), self.matcher.may_write(node)
        call = Call(node.target, node.op, args, kwargs, reads, transparent, elementwise, pure=pure, writes=writes)
        return call._replace(fast=self._is_fast(node, call))

    def _is_fast(self, node: fx.Node, call: Call) -> bool:
        if node.op == "call_module":
            return type(self.matcher.called(node)) in _FAST_LAYERS
        return mean_of(call, None) is not None

    def _is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            called = self.matcher.called(node)
            return isinstance(called, _TRANSPARENT_LAYERS) and not called.training
        if node.op == "call_function":
            if node.target is F.pad:
                mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
                return isinstance(mode, str) and mode == "constant"
            return node.target in _TRANSPARENT_FUNCTIONS or (node.target is F.batch_norm and self._is_pure(node))
        return node.op == "call_method" and node.target in _TRANSPARENT_METHODS

    def _is_elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.matcher.called(node), _ELEMENTWISE_LAYERS)
        return node.target in (_ELEMENTWISE_FUNCTIONS if node.op == "call_function" else _ELEMENTWISE_METHODS)

    def _is_pure(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            called = self.matcher.called(node)
            return called is not None and is_layer(called) and not called.training
        return is_repeatable(node)


def template(value: Any, number: Callable[[fx.Node], int]) -> Any:
    """A structure of nodes as one of values."""
    if isinstance(value, fx.Node):
        return Value(number(value))
    if isinstance(value, tuple) and type(value) is not torch.Size:
        items = [template(item, number) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [template(item, number) for item in value]
    if isinstance(value, dict):
        kind = dict if type(value).__module__.startswith("torch.fx") else type(value)
        return kind((key, template(item, number)) for key, item in value.items())
    if isinstance(value, slice):
        return slice(*(template(part, number) for part in (value.start, value.stop, value.step)))
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name, item in vars(value).items():
            object.__setattr__(value, name, template(item, number))
    return value


_FAST_LAYERS = (nn.Linear, nn.AdaptiveAvgPool2d)
