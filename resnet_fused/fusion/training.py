"""Training: each batch norm with the sum and the ReLU after it as one op, everything else as the module's forward calls it.

The trace is one with autograd, in the modules' present modes. Its calls run in their order, once each, so that random numbers,
running statistics and whatever else they do are as in stock.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fused import config
from resnet_fused.backends import Activation
from resnet_fused.fusion.batch_norm import FunctionalNorm, conv2d, fused
from resnet_fused.fusion.building import template
from resnet_fused.fusion.graph import run_call, submodule
from resnet_fused.fusion.guards import Structure
from resnet_fused.fusion.layers import get
from resnet_fused.fusion.nodes import Nodes
from resnet_fused.fusion.traces import LONGEST_WAIT, PROMPT_TRACES
from resnet_fused.fusion.tracing import CannotTrace, trace
from resnet_fused.runtime.calls import autocast_dtype, needs_grad, plain
from resnet_fused.runtime.layers import mean_of
from resnet_fused.runtime.program import Call, fill

_RELU = (Activation.RELU, 0.0)
_IN_PLACE_SUMS = (operator.iadd, "add_", "__iadd__")
_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


@dataclass(eq=False)
class NormMatch:
    """A batch norm with what is fused into it.

    Attributes:
        name: path of its module, or of that which holds its parameters.
        covered: the nodes whose work it does, in order: the norm, a sum, a ReLU.
        arguments: of a call of F.batch_norm, those of `FunctionalNorm`; None for a module.
        residual: what is added, if a sum is fused.
        relu: whether a ReLU is.
    """

    name: str
    covered: list[fx.Node]
    arguments: tuple[Any, ...] | None
    residual: fx.Node | None = None
    relu: bool = False

    @property
    def input(self) -> fx.Node:
        source = self.covered[0].args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def position(self) -> fx.Node:
        """The node in whose place the op runs: where a residual is there, or where the norm was."""
        return self.covered[0 if self.residual is None else 1]

    @property
    def op(self) -> str:
        """The op that computes it."""
        return "bn_add_relu" if self.residual is not None else "bn_relu" if self.relu else "bn"


class TrainingMatcher(Nodes):
    """Finds the batch norms of one trace. `matches`: by the node of the norm."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph)
        found = [match for node in graph.nodes if (match := self._norm(node)) is not None]
        self.matches = {match.covered[0]: match for match in found}
        self._calls = [match.name for match in found]
        for node in graph.nodes:
            self._match_sum(node)
        for match in found:
            following = self.next_reader(match.covered[-1])
            if not match.relu and following is not None and self.activation(following) == _RELU:
                match.covered.append(following)
                match.relu = True

    def _norm(self, node: fx.Node) -> NormMatch | None:
        if node.op == "call_module":
            called = self.called(node)
            return NormMatch(str(node.target), [node], None) if type(called) in (nn.BatchNorm2d, nn.SyncBatchNorm) else None
        if node.target is not F.batch_norm or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        given = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        if len(given) != len(_ARGUMENTS) or not isinstance(given["training"], bool):
            return None
        if isinstance(given["momentum"], fx.Node) or isinstance(given["eps"], fx.Node):
            return None
        arguments = tuple(given[name] for name in _ARGUMENTS[1:])
        read = next((a for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        return None if read is None else NormMatch(str(read.target).rpartition(".")[0], [node], arguments)

    def _match_sum(self, node: fx.Node) -> None:
        """A sum that a ReLU follows: given to the later one of the norms that it adds, so that the less lies between."""
        operands, following = self.add_operands(node), self.next_reader(node)
        if operands is None or following is None or self.activation(following) != _RELU or operands[0] is operands[1]:
            return
        pairs = [operands, operands[::-1]]
        for own, other in sorted(pairs, key=lambda pair: -self.order[self.producer(pair[0])]):
            match = self.matches.get(self.producer(own))
            if match is None or self.next_reader(match.covered[0]) is not node or self._calls.count(match.name) > 1:
                continue
            # The fused op doesn't write the sum into the other operand.
            written = self.producer(other)
            unseen = written in self.matches and self.next_reader(written) is node
            if node.target in _IN_PLACE_SUMS and node.args[0] is not own and not unseen:
                continue
            between = [n for n, at in self.order.items() if self.order[match.covered[0]] < at < self.order[node]]
            if any(self.may_write(n) or self._reads_tensors_of(n, match) for n in between):
                continue
            match.covered += [node, following]
            match.residual, match.relu = other, True
            return

    def _reads_tensors_of(self, node: fx.Node, match: NormMatch) -> bool:
        """Whether a node reads a tensor of a norm's, such as its running statistics."""
        read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        return any(path.rpartition(".")[0] == match.name for path in read)


class Trained:
    """The training path of one module: made for one trace of it.

    Attributes:
        trace: the trace.
        matches: its batch norms.

    Raises:
        CannotTrace: the forward can't be traced, or has no batch norm; the message is the reason.
    """

    def __init__(self, module: nn.Module) -> None:
        with torch.enable_grad():
            self.trace = found = trace(module, training=True)
        if found.assumes_batches:
            raise CannotTrace(f"forward of {type(module).__name__} asks for the dimensions of a tensor that nothing tells of")
        matcher = TrainingMatcher(module, found.graph)
        self.matches = [*matcher.matches.values()]
        if not self.matches:
            raise CannotTrace(next(iter(found.opaque.values()), "it has no batch norm"))
        self._module = module
        self._steps = _steps(matcher)
        self._count = len(matcher.order)
        self._outputs = template(found.structure, _numbering(matcher))
        called = (node for node in found.graph.nodes if node.op == "call_module" and matcher.called(node) is not None)
        absorbed = [*found.inlined, *(str(node.target) for node in called)]
        self._structure = Structure(module, found, [*dict.fromkeys(absorbed)])
        self._kinds = self._kinds_now()

    def holds(self) -> bool:
        """Whether everything is as it was when the forward was traced."""
        return self._structure.fault() is None and self._kinds_now() == self._kinds

    def _kinds_now(self) -> list[Any]:
        """What the forward may have asked of its parameters: model.half() changes it in place."""
        asked = (get(self._module, path) for path in self.trace.asked)
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in asked]

    def __call__(self, args: Sequence[Tensor]) -> Any:
        values: list[Any] = [*args, *[None] * (self._count - len(args))]
        for step in self._steps:
            step.run(self._module, values)
            for number in step.frees:
                values[number] = None
        return fill(self._outputs, values.__getitem__)


class TrainingTraces:
    """The training path of a module in one mode, made again where the module isn't what it was.

    Attributes:
        untraceable: why there is none; "" if there is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made: Trained | None = None
        self._attempts = self._wait = 0
        self.untraceable = ""

    def current(self) -> Trained | None:
        """The path that holds now; None, with `untraceable`, where there is none."""
        if self._made is not None and self._made.holds():
            return self._made
        self._made = None
        if self._wait > 0:
            self._wait -= 1
            return None
        self._attempts += 1
        self._wait = 2 ** min(self._attempts - PROMPT_TRACES, LONGEST_WAIT) if self._attempts > PROMPT_TRACES else 0
        try:
            self._made = Trained(self._module)
        except CannotTrace as reason:
            self.untraceable, self._wait = str(reason), max(self._wait, 2 ** min(self._attempts, LONGEST_WAIT))
            return None
        except Exception as error:  # the model's code ran on stand-ins, and may do anything; it runs as stock
            self.untraceable, self._wait = f"its forward can't be read: {type(error).__name__}: {error}", 2**LONGEST_WAIT
            config.logger().debug("tracing %s for training failed", type(self._module).__name__, exc_info=True)
            return None
        self.untraceable = ""
        return self._made

    def for_report(self) -> Trained | None:
        """As `current`, for someone who makes no later call wait for its trace."""
        (attempts, wait), self._wait = (self._attempts, self._wait), 0
        made = self.current()
        self._attempts, self._wait = attempts, wait if made is None else 0
        return made


@dataclass(eq=False)
class _Step:
    """One call, of which the result becomes value `number`. `frees`: values that aren't needed any more."""

    number: int
    call: Call
    frees: list[int] = field(default_factory=list)

    @property
    def reads(self) -> tuple[int, ...]:
        return self.call.reads

    def run(self, module: nn.Module, values: list[Any]) -> None:
        values[self.number] = run_call(self.call, module, values)


class _ConvStep(_Step):
    """A call of nn.Conv2d, by our kernels where they are the faster."""

    def run(self, module: nn.Module, values: list[Any]) -> None:
        values[self.number] = conv2d(submodule(module, self.call.target), values[self.call.reads[0]])


class _MeanStep(_Step):
    """A mean over all pixels, whose gradient is no tensor of x's size: stock makes one, which is then added to another."""

    def run(self, module: nn.Module, values: list[Any]) -> None:
        x = values[self.call.reads[0]]
        if (
            type(x) is Tensor
            and x.dim() == 4
            and x.numel()
            and needs_grad(x)
            and plain(x)
            and autocast_dtype(x.device.type) is None
        ):
            values[self.number] = _MeanFunction.apply(x, lambda: run_call(self.call, module, values))
        else:
            super().run(module, values)


class _MeanFunction(torch.autograd.Function):
    """A mean over the pixels of x, by `compute`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        ctx.shape = x.shape
        return compute()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        n, c, h, w = ctx.shape
        return (dy.reshape(n, c, 1, 1) / (h * w)).expand(ctx.shape), None


@dataclass(eq=False)
class _NormStep(_Step):
    """A batch norm with what is fused into it: `calls` with their values' numbers, of which `call` is the first.

    `arguments`: of a call of F.batch_norm, those of `FunctionalNorm`.
    """

    x: int = 0
    residual: int | None = None
    relu: bool = False
    arguments: tuple[Any, ...] | None = None
    calls: list[tuple[int, Call]] = field(default_factory=list)

    @property
    def reads(self) -> tuple[int, ...]:
        made = {number for number, _ in self.calls}
        return tuple(number for _, call in self.calls for number in call.reads if number not in made)

    def run(self, module: nn.Module, values: list[Any]) -> None:
        y = self._fused(module, values)
        if y is None:
            for number, call in self.calls:
                y = values[number] = run_call(call, module, values)
            for number, _ in self.calls:
                values[number] = None
        values[self.number] = y

    def _fused(self, module: nn.Module, values: list[Any]) -> Tensor | None:
        x = values[self.x]
        residual = None if self.residual is None else values[self.residual]
        # Where formats differ, that of the sum depends on the order of its operands.
        if residual is not None and (type(residual) is not Tensor or residual.stride() != x.stride()):
            return None
        if self.arguments is None:
            return fused(submodule(module, self.call.target), x, residual, self.relu)
        return fused(FunctionalNorm(*fill(self.arguments, values.__getitem__)), x, residual, self.relu)


def _numbering(nodes: Nodes) -> Any:
    """Numbers of nodes' values, identities seen through."""
    return lambda node: nodes.order[nodes.producer(node)]


def _steps(matcher: TrainingMatcher) -> list[_Step]:
    """What a trace does, in its order, with each value freed after its last reader."""
    number = _numbering(matcher)

    def call(node: fx.Node) -> Call:
        args, kwargs = template(tuple(node.args), number), template(dict(node.kwargs), number)
        reads = tuple(dict.fromkeys(map(number, node.all_input_nodes)))
        return Call(node.target, node.op, args, kwargs, reads, transparent=False)

    matches = {match.position: match for match in matcher.matches.values()}
    covered = {node for match in matches.values() for node in match.covered}
    steps: list[_Step] = []
    for node in matcher.graph.nodes:
        match = matches.get(node)
        if match is not None:
            calls = [(matcher.order[each], call(each)) for each in match.covered]
            residual = None if match.residual is None else number(match.residual)
            arguments = None if match.arguments is None else template(match.arguments, number)
            last, x = matcher.order[match.covered[-1]], number(match.input)
            steps.append(_NormStep(last, calls[0][1], [], x, residual, match.relu, arguments, calls))
        elif node not in covered and node.op not in ("placeholder", "output") and not matcher.is_identity(node):
            layer, called = matcher.called(node), call(node)
            is_mean = (layer is not None or node.op != "call_module") and mean_of(called, layer) is not None
            kind = _ConvStep if type(layer) is nn.Conv2d else _MeanStep if is_mean else _Step
            steps.append(kind(matcher.order[node], called))
    results = {number(node) for output in matcher.graph.find_nodes(op="output") for node in output.all_input_nodes}
    last_step = {each: step for step in steps for each in (*step.reads, step.number)}
    for each, step in last_step.items():
        if each not in results:
            step.frees.append(each)
    return steps
