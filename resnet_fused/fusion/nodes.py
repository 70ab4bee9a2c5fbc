"""Reads the nodes of a trace: what they call, apply and write, and who reads their results."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from resnet_fused.backends import Activation
from resnet_fused.fusion.activations import activation_called, activation_of
from resnet_fused.fusion.results import name_of, writes
from resnet_fused.fusion.tracing import has_hooks, is_layer

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_PLAIN_LAYERS = "torch.nn.modules"


class Nodes:
    """The nodes of one trace.

    Args:
        module: the traced module.
        graph: its nodes.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}

    def called(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls, if it is such a call with one argument, and nobody's hook sees it."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        module = self.module.get_submodule(str(node.target))
        return None if has_hooks(module) or "forward" in vars(module) else module

    def is_identity(self, node: fx.Node) -> bool:
        called = self.called(node)
        if isinstance(called, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            return not called.training
        return type(called) is nn.Identity

    def activation(self, node: fx.Node) -> tuple[Activation, float] | None:
        """The function of one value that a node applies, and its slope below zero; None if epilogues don't have it."""
        if node.op == "call_module":
            return activation_of(self.called(node))
        return activation_called(node)

    def add_operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Both operands of a plain sum of two nodes, None for any other node."""
        function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
        method = node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__")
        if not (function or method) or len(node.args) != 2 or node.kwargs:
            return None
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None

    def may_write(self, node: fx.Node) -> bool:
        """Whether a node may write to its inputs: in-place functions and methods, and modules that aren't known not to."""
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
            kind = parametrize.type_before_parametrizations(called)
            known = is_layer(called) and kind.__module__.startswith(_PLAIN_LAYERS)
            return not known or self.has_inplace(node) or has_hooks(called)
        return node.op in ("call_function", "call_method") and writes(node)

    def has_inplace(self, node: fx.Node) -> bool:
        """Whether a called module writes into its input by its setting."""
        return bool(getattr(self.module.get_submodule(str(node.target)), "inplace", False))

    def next_reader(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a node's result, seen through identities; None if there is none or several."""
        users = list(node.users)
        if len(users) != 1:
            return None
        return self.next_reader(users[0]) if self.is_identity(users[0]) else users[0]

    def producer(self, node: fx.Node) -> fx.Node:
        """The node whose result `node` is, seen back through identities."""
        while self.is_identity(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def describe(self, node: fx.Node | None) -> str:
        """A node in the words of the report."""
        if node is None:
            return "several readers"
        if node.op == "call_module":
            return type(self.module.get_submodule(str(node.target))).__name__
        if node.op == "output":
            return "the end of forward"
        return name_of(node)
