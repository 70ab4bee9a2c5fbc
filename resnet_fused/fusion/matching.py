"""Matches convolutions with what follows them (batch norm, sum, ReLU, max-pool), residual blocks and passes, in a trace."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx, nn

from resnet_fused.backends import Activation, Conv, Pool
from resnet_fused.fusion.layers import Tensors, convolution, norm
from resnet_fused.fusion.matches import ConvMatch, Group, Match
from resnet_fused.fusion.nodes import Nodes
from resnet_fused.fusion.passes import match_gate, match_norm
from resnet_fused.fusion.results import writes
from resnet_fused.runtime.folding import NotFoldable, check_overflow
from resnet_fused.runtime.views import View, view_of, viewed_pool

_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Matcher(Nodes):
    """Finds the groups of one trace.

    Args:
        module: the traced module.
        graph: its nodes.
        alone: names of convolutions whose sum is left to stock, since its operands turned out to be no equals.

    Attributes:
        tensors: of the convolutions and batch norms, by name.
        groups: in the order in which they are computed.
        reasons: by the name of a convolution, why it is in none.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, alone: frozenset[str] = frozenset()) -> None:
        super().__init__(module, graph)
        self.alone = alone
        self.tensors = Tensors(module)
        self.reasons: dict[str, str] = {}
        self.matches: list[Match] = []
        self.by_last: dict[fx.Node, Match] = {}
        for node in graph.nodes:
            self._add(self._match(node))
        if self.matches:
            for node in graph.nodes:
                self._match_pass(node)
        for node in graph.nodes:
            self._match_sum(node)
        for match in self.matches:
            self._match_tail(match)
        self.by_last = {match.last: match for match in self.matches}
        self.groups = self._groups()

    def _add(self, match: Match | None) -> None:
        if match is not None:
            self.matches.append(match)
            self.by_last[match.last] = match

    @property
    def convolutions(self) -> list[ConvMatch]:
        return [match for match in self.matches if isinstance(match, ConvMatch)]

    def _match_pass(self, node: fx.Node) -> None:
        """A gate, or a batch norm that no convolution takes, in a forward that has convolutions."""
        if node not in self.by_last:
            self._add(match_gate(self, node) or match_norm(self, node))

    # ---- one convolution with its batch norm --------------------------------------------------------------------------

    def _match(self, node: fx.Node) -> ConvMatch | None:
        try:
            layer = convolution(self.tensors, node)
            if layer is None:
                return None
            if not isinstance(node.args[0], fx.Node):
                raise NotFoldable("its input is no tensor of the forward's")
            if not node.users:
                raise NotFoldable("its output is not used")
            following = self.next_reader(node)
            found, note = None, ""
            if following is not None:
                try:
                    found = norm(self.module, following)
                except NotFoldable as reason:
                    note = str(reason)
            if found is None or following is None or found.dims not in (None, layer.conv.dims):
                return ConvMatch(self._name(node), [node], layer, note=note)
            weight, var = self.tensors[layer.weight], self.tensors[found.var]
            if var.numel() != weight.shape[0]:
                raise NotFoldable(f"the batch norm has {var.numel()} channels and the convolution {weight.shape[0]}")
            gamma, bias = (None if name is None else self.tensors[name] for name in (found.gamma, layer.bias))
            check_overflow(weight, (bias, self.tensors[found.mean]), var, gamma, found.eps)
        except NotFoldable as reason:
            self.reasons[self._name(node)] = str(reason)
            return None
        return ConvMatch(self._name(node), [node, following], layer, norm=found)

    def _name(self, node: fx.Node) -> str:
        """Name of a convolution in the report: its path, or for F.conv2d that of the weight's owner."""
        if node.op == "call_module":
            return str(node.target)
        read = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
        for source in read:  # which grows: of a weight that is computed it is a parameter's owner
            if source.op == "get_attr":
                return str(source.target).rpartition(".")[0]
            read += [n for n in source.all_input_nodes if n not in read]
        return ""

    # ---- what follows ------------------------------------------------------------------------------------------------

    def _match_sum(self, node: fx.Node) -> None:
        """A sum and what follows: gives it to one of its operands if that is a match which nothing else reads."""
        operands = self.add_operands(node)
        if operands is None:
            return
        best: tuple[int, Match, fx.Node] | None = None
        for own, other in (operands, operands[::-1]):
            match = self.by_last.get(self.producer(own))
            if match is None or match.add is not None or self.next_reader(match.last) is not node:
                continue
            if match.name in self.alone or other.op == "get_attr":
                match.note = "the sum after it is one of tensors that differ in shape, dtype or format"
                continue
            if own is other or not self._may_skip_write(node, own, other):
                match.note = "the sum after it overwrites a tensor that others read"
                continue
            if self.written_between(match.first, node, [match]):
                match.note = "a tensor is overwritten before the sum, where a fused op would read its input"
                continue
            depth = self._depth(match)
            if best is None or depth > best[0]:
                best = (depth, match, other)
        if best is not None:
            _, match, residual = best
            match.residual, match.add, match.renews = residual, node, not writes(node)
            match.covered.append(node)
            self.by_last[node] = match
            self._match_activation(match)

    def _match_activation(self, match: Match) -> bool:
        """The function that is applied to a match's result, if nothing else reads that; whether there is one."""
        following = self.next_reader(match.last)
        found = None if following is None else self.activation(following)
        if found is None or following is None:
            return False
        match.activation, match.slope = found
        match.renews |= not self.may_write(following)
        match.covered.append(following)
        return True

    def _may_skip_write(self, node: fx.Node, own: fx.Node, other: fx.Node) -> bool:
        """Whether nobody sees that the fused op doesn't write the sum into its first operand, as the traced one may do."""
        if node.target not in (operator.iadd, "add_", "__iadd__") or node.args[0] is own:
            return True
        written = self.producer(other)
        return written in self.by_last and self.next_reader(written) is node

    def written_between(self, first: fx.Node, last: fx.Node, matches: Iterable[Match] = ()) -> bool:
        """Whether a tensor may be written to between two nodes, by other nodes than those that some matches cover."""
        covered = {node for match in matches for node in match.covered}
        # A convolution's result is new, and only its batch norm, of whatever class, may write into it.
        covered.update(node for match in self.convolutions for node in match.scaled)
        inside = (n for n, at in self.order.items() if self.order[first] < at < self.order[last] and n not in covered)
        return any(self.may_write(n) and not self._writes_own(n) for n in inside)

    def _writes_own(self, node: fx.Node) -> bool:
        """Whether a node writes only into a fresh result that nothing else reads: in place, after a batch norm."""
        source = node.args[0] if node.args else None
        if self.activation(node) is None or not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        return source in {match.scaled[-1] for match in self.convolutions} or self.add_operands(source) is not None

    def _depth(self, match: Match) -> int:
        """Length of the chain of matches that ends with this one: the main path of a block is longer than its shortcut."""
        depth = 1
        while (previous := self.by_last.get(self._before(match))) is not None:
            match, depth = previous, depth + 1
        return depth

    def _before(self, match: Match) -> fx.Node:
        source = self.producer(match.input)
        # An activation that isn't given to its match yet stands between the matches.
        if self.activation(source) is not None and isinstance(source.args[0], fx.Node):
            return self.producer(source.args[0])
        return source

    def _match_tail(self, match: Match) -> None:
        """An activation, and the max-pool of a stem."""
        if match.add is None and not self._match_activation(match):
            following = self.next_reader(match.last)
            if following is None and len(match.last.users) > 1:
                match.note = match.note or "its result has several readers, so nothing more is fused"
            elif following is not None and following.op == "call_module" and self.add_operands(following) is None:
                match.note = match.note or f"{self.describe(following)} follows, which isn't fused"
        if not isinstance(match, ConvMatch):
            return
        if match.layer.conv.dims == 3 and view_of(match.layer.conv) is View.SAME:
            match.note = match.note or "its filter reaches in three dimensions, where stock's kernels compute it, folded"
        if match.activation is Activation.RELU and match.add is None and not match.layer.pad:
            following = self.next_reader(match.last)
            if following is not None:
                match.pool = self._pool(following, match.layer.conv)
                if match.pool is not None:
                    match.covered.append(following)

    def _pool(self, node: fx.Node, conv: Conv) -> Pool | None:
        """The max-pool that a node calls, if it has the form that a stem takes."""
        called, dims = self.called(node), conv.dims
        if type(called) is not _POOLS[dims] or called.ceil_mode or called.return_indices:
            return None
        each = torch.nn.modules.utils._ntuple(dims)
        if {*each(called.dilation)} != {1}:
            return None
        pool = Pool(each(called.kernel_size), each(called.stride), each(called.padding))
        return None if viewed_pool(pool, view_of(conv)) is None else pool

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """All matches, those of a residual block together, in the order in which they are computed."""
        groups: list[Group] = []
        taken: set[int] = set()
        for match in self.convolutions:
            block = self._block(match)
            if block is not None:
                groups.append(block)
                taken.update(map(id, block.matches))
        groups += [Group.of(match) for match in self.matches if id(match) not in taken]
        return sorted(groups, key=lambda group: self.order[group.position])

    def _block(self, last: ConvMatch) -> Group | None:
        """The residual block that ends with a match; None if none does."""
        if last.residual is None or last.activation is not Activation.RELU:
            return None
        residual = self.producer(last.residual)
        shortcut = self.by_last.get(residual)
        if not isinstance(shortcut, ConvMatch) or (
            shortcut.activation is not Activation.NONE or shortcut.residual is not None or len(shortcut.last.users) != 1
        ):
            shortcut = None
        chain = [last]
        while len(chain) <= 3:
            source = self.producer(chain[0].input)
            projected = shortcut is not None and self.producer(shortcut.input) is source
            if source is residual or projected:
                break
            previous = self.by_last.get(source)
            if (
                not isinstance(previous, ConvMatch)
                or previous.activation is not Activation.RELU
                or previous.add is not None
                or previous.pool is not None
            ):
                return None
            if len(source.users) != 1:
                return None
            chain.insert(0, previous)
        if len(chain) not in (2, 3):
            return None
        matches = [*chain, shortcut] if projected and shortcut is not None else chain
        if any(match.layer.pad for match in matches) or len({view_of(match.layer.conv) for match in matches}) > 1:
            return None
        if view_of(last.layer.conv) is View.SAME and last.layer.conv.dims != 2:
            return None  # one by one on stock's kernels
        first = min((match.conv for match in matches), key=self.order.__getitem__)
        if self.written_between(first, last.last, matches):
            return None
        return Group.of_block(chain, shortcut if projected else None)
