"""Matches Conv-BN, Conv-BN-ReLU, Conv-BN-add-ReLU, stems and whole residual blocks in the graph of one module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.backends import Pool, Precision
from resnet_fused.fusion.tracing import Reader
from resnet_fused.modules.folding import NotFoldable, check_conv, is_norm
from resnet_fused.modules.fused import FusedBlock, FusedConv2d, FusedConv2dAdd, FusedModule, FusedStem


@dataclass
class Unit:
    """One convolution with all that is fused into it.

    Attributes:
        conv: the convolution's node.
        name: path of the convolution inside the traced module.
        fused: its fused module, without ReLU until `finish`, unless it was fused before.
        covered: nodes whose work the fused module does, the convolution first, in order.
        add, residual: the sum's node and the operand that is not this convolution, if a sum is fused.
        pool: the max-pool that follows, if it can be fused into a stem.
        note: why no more than this was fused, for the report.
        was_fused: whether the convolution and its batch norm had been fused in an inner module before.
    """

    conv: fx.Node
    name: str
    fused: FusedConv2d
    covered: list[fx.Node] = field(default_factory=list)
    add: fx.Node | None = None
    residual: fx.Node | None = None
    relu: bool = False
    pool: nn.MaxPool2d | None = None
    note: str = ""
    was_fused: bool = False

    @property
    def last(self) -> fx.Node:
        return self.covered[-1]

    @property
    def input(self) -> fx.Node:
        source = self.conv.args[0]
        assert isinstance(source, fx.Node)
        return source

    def drop_tail(self, note: str) -> None:
        """Leaves the sum, ReLU and pool as they are, where only convolution and batch norm can be fused."""
        del self.covered[1 if self.was_fused else 2 :]
        self.add = self.residual = self.pool = None
        self.relu, self.note = self.fused.relu, note

    @property
    def changes(self) -> bool:
        """Whether there is anything to do that an inner module's fusion didn't do before."""
        more = self.relu != self.fused.relu or self.residual is not None or self.pool is not None
        return more or not self.was_fused

    @property
    def op(self) -> str:
        if self.pool is not None:
            return "stem"
        if self.residual is not None:
            return "conv2d_bn_add_relu"
        return "conv2d_bn_relu" if self.relu else "conv2d_bn"

    def finish(self) -> FusedModule:
        """The fused module with what the match found behind the convolution."""
        fused = self.fused
        if self.relu != fused.relu or self.residual is not None:
            kind = FusedConv2dAdd if self.residual is not None else FusedConv2d
            fused = kind.like(fused, relu=self.relu)
        return FusedStem(fused, pool_geometry(self.pool)) if self.pool is not None else fused


class Matcher:
    """Finds the units of one graph. `reasons` tells, by path of the convolution, why one was not fused."""

    def __init__(self, reader: Reader, shared: set[int], precision: Precision, backend: str) -> None:
        self.reader, self.shared = reader, shared
        self.precision, self.backend = precision, backend
        self.reasons: dict[str, str] = {}
        self.units: list[Unit] = []
        for node in reader.graph.nodes:
            unit = self._unit(node)
            if unit is not None:
                self.units.append(unit)
        self.by_last = {unit.last: unit for unit in self.units}
        for node in list(reader.graph.nodes):
            self._match_sum(node)
        for unit in self.units:
            self._match_tail(unit)
        self.by_last = {unit.last: unit for unit in self.units}

    def _unit(self, node: fx.Node) -> Unit | None:
        called = self.reader.called(node)
        if isinstance(called, FusedConv2d) and not isinstance(called, FusedConv2dAdd):
            return Unit(node, str(node.target), called, [node], relu=called.relu, was_fused=True)
        conv, name = self._convolution(node, called)
        if conv is None:
            return None
        try:
            norm_node, norm = self._norm_behind(node, conv, name)
            fused = FusedConv2d.of(conv, norm, False, self.precision, self.backend)
        except NotFoldable as reason:
            self.reasons[name] = str(reason)
            return None
        return Unit(node, name, fused, [node, norm_node])

    def _convolution(self, node: fx.Node, called: nn.Module | None) -> tuple[nn.Conv2d | None, str]:
        """The convolution that a node computes, by a module or by F.conv2d on the traced module's own parameters."""
        if isinstance(called, nn.Conv2d):
            return called, str(node.target)
        if node.op == "call_function" and node.target in (F.conv2d, torch.conv2d):
            return _functional_conv(self.reader.module, node), ""
        return None, ""

    def _norm_behind(self, node: fx.Node, conv: nn.Conv2d, name: str) -> tuple[fx.Node, nn.Module]:
        check_conv(conv)
        if name and self.reader.calls[name] > 1:
            raise NotFoldable("the convolution is called more than once in one forward")
        if id(conv.weight) in self.shared:
            raise NotFoldable("the convolution's weight is shared with another module")
        following = self.reader.next_reader(node)
        if following is None:
            readers = len(node.users)
            raise NotFoldable(
                f"its output has {readers} readers, not one batch norm alone" if readers else "its output is not used"
            )
        norm = self.reader.called(following)
        if norm is None or not is_norm(norm):
            raise NotFoldable(f"no batch norm follows, but {self.reader.describe(following)}")
        return following, norm

    def _match_sum(self, node: fx.Node) -> None:
        """Conv-BN-add-ReLU: gives the sum to one of its operands if that is a unit which nothing else reads."""
        operands = self.reader.add_operands(node)
        if operands is None:
            return
        relu = self.reader.next_reader(node)
        best: tuple[int, Unit, fx.Node] | None = None
        for own, other in (operands, operands[::-1]):
            unit = self.by_last.get(self.reader.producer(own))
            if unit is None or unit.relu or unit.add is not None or self.reader.next_reader(unit.last) is not node:
                continue
            if relu is None or not self.reader.is_relu(relu):
                unit.note = f"the sum behind it is not followed by ReLU alone, but by {self.reader.describe(relu)}"
                continue
            if own is other or not self._may_skip_write(node, own, other):
                unit.note = "the sum behind it overwrites a tensor that others read"
                continue
            if self._input_overwritten(unit, node):
                unit.note = "its input is overwritten before the sum, where a fused op would read it"
                continue
            depth = self._depth(unit)
            if best is None or depth > best[0]:
                best = (depth, unit, other)
        if best is not None and relu is not None:
            _, unit, residual = best
            unit.residual, unit.add, unit.relu = residual, node, True
            unit.covered += [node, relu]

    def _may_skip_write(self, node: fx.Node, own: fx.Node, other: fx.Node) -> bool:
        """Whether nobody sees that the fused op doesn't write the sum into its first operand, as the traced one may do."""
        if not self.reader.overwrites_first(node) or node.args[0] is own:
            return True
        return other.op == "call_module" and len(other.users) == 1

    def _input_overwritten(self, unit: Unit, until: fx.Node) -> bool:
        """Whether the convolution's input may be written to between the convolution and the sum.

        The fused op reads its input where the sum stands, since the residual may come no earlier.
        """
        node = unit.conv.next
        while node is not until:
            if unit.input in node.all_input_nodes and self.reader.may_write(node):
                return True
            node = node.next
        return False

    def _depth(self, unit: Unit) -> int:
        """Length of the chain of units that ends with this one: the main path of a block is longer than its shortcut."""
        depth = 1
        while (previous := self.by_last.get(self._before(unit))) is not None:
            unit, depth = previous, depth + 1
        return depth

    def _before(self, unit: Unit) -> fx.Node:
        source = self.reader.producer(unit.input)
        # A ReLU that isn't given to its unit yet stands between the units.
        if self.reader.is_relu(source) and isinstance(source.args[0], fx.Node):
            return self.reader.producer(source.args[0])
        return source

    def _match_tail(self, unit: Unit) -> None:
        """Conv-BN-ReLU, and the max-pool of a stem."""
        if unit.add is None and not unit.relu:
            following = self.reader.next_reader(unit.last)
            if following is not None and self.reader.is_relu(following):
                unit.relu = True
                unit.covered.append(following)
            elif following is None and len(unit.last.users) > 1:
                unit.note = unit.note or "its batch norm's output has several readers, so nothing more is fused"
            elif following is not None and following.op == "call_module" and self.reader.add_operands(following) is None:
                unit.note = unit.note or f"{self.reader.describe(following)} follows; only ReLU is fused"
        if unit.relu and unit.add is None and not unit.fused.pad:
            following = self.reader.next_reader(unit.last)
            if following is not None:
                unit.pool = self.reader.pool_of(following)
                if unit.pool is not None:
                    unit.covered.append(following)

    def block(self) -> tuple[FusedBlock, list[Unit]] | None:
        """The whole graph as one residual block, if that is what it is, with its units in the block's order."""
        nodes = list(self.reader.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        (end,) = (node for node in nodes if node.op == "output")
        if len(inputs) != 1 or not isinstance(end.args[0], fx.Node):
            return None
        last = self.by_last.get(self.reader.producer(end.args[0]))
        if last is None or last.residual is None:
            return None
        chain = [last]
        while (source := self.reader.producer(chain[0].input)) is not inputs[0]:
            previous = self.by_last.get(source)
            if previous is None or not previous.relu or previous.add is not None or len(source.users) != 1:
                return None
            chain.insert(0, previous)
        shortcut: Unit | None = None
        residual = self.reader.producer(last.residual)
        if residual is not inputs[0]:
            shortcut = self.by_last.get(residual)
            if shortcut is None or shortcut.relu or self.reader.producer(shortcut.input) is not inputs[0]:
                return None
        units = [*chain, *([shortcut] if shortcut else [])]
        covered = {node for unit in units for node in unit.covered}
        rest = [n for n in nodes if n not in covered and n not in (inputs[0], end) and not self.reader.is_identity(n)]
        plain = all(not unit.fused.pad and unit.pool is None for unit in units)
        if rest or len(chain) not in (2, 3) or not plain:
            return None
        return FusedBlock([unit.fused for unit in chain], shortcut.fused if shortcut else None), units


def _functional_conv(module: nn.Module, node: fx.Node) -> nn.Conv2d | None:
    """nn.Conv2d that computes F.conv2d(x, self.weight, self.bias, …) of the traced module, or None if it isn't that."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    tensors: dict[str, Any] = {}
    for name in ("weight", "bias"):
        value = given.get(name)
        if value is None and name == "bias":
            tensors[name] = None
        elif isinstance(value, fx.Node) and value.op == "get_attr":
            owner, _, attribute = str(value.target).rpartition(".")
            tensors[name] = getattr(module.get_submodule(owner), attribute)
        else:
            return None
    if not isinstance(given.get("input"), fx.Node) or not node.args or tensors["weight"].dim() != 4:
        return None
    geometry = {k: given[k] for k in ("stride", "padding", "dilation", "groups") if k in given}
    if any(isinstance(v, fx.Node) for v in fx.node.map_arg(tuple(geometry.values()), lambda n: n) if v is not None):
        return None
    out_channels, per_group, *kernel = tensors["weight"].shape
    conv = nn.Conv2d(
        per_group * geometry.get("groups", 1),
        out_channels,
        tuple(kernel),
        bias=tensors["bias"] is not None,
        device="meta",
        **geometry,
    )
    for name, tensor in tensors.items():
        setattr(conv, name, tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
    return conv


def pool_geometry(pool: nn.MaxPool2d) -> Pool:
    """Geometry of a max-pool module."""
    pair = torch.nn.modules.utils._pair
    return Pool(pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
