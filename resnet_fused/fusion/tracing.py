"""Traces the forward of one module, its children as opaque calls, and reads the traced nodes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.modules.folding import hooks_of

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
# What tells the memory format of a tensor, or fails where the format isn't the one that stock's would be.
_FORMAT_SENSITIVE = ("view", "view_as", "stride", "is_contiguous", "as_strided", "data_ptr", "unfold")


class CannotTrace(Exception):
    """A module's forward can't be traced; the message is the reason, as the report prints it."""


def is_inlined(module: nn.Module) -> bool:
    """Whether a call of the module is traced through: a plain Sequential, which only calls its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooks_of(module)


class _Proxy(fx.Proxy):
    """Records augmented assignments as such. fx's own proxies have no `__iadd__`, so `x += y` would look like `x = x + y`."""

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_inlined(m)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of the module's forward, with every child but plain Sequentials as one node.

    Raises:
        CannotTrace: if forward branches on values, takes optional arguments, or changes the module.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
            raise CannotTrace(f"forward of {type(module).__name__} has the optional argument {p.name!r}")
    before = {k: id(v) for k, v in vars(module).items()}
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # forward is the user's code and may raise anything on a proxy
        message = str(error).strip().splitlines()
        reason = message[0] if message else type(error).__name__
        raise CannotTrace(f"forward of {type(module).__name__} can't be traced: {reason}") from error
    finally:
        constants = [k for k in vars(module) if k.startswith("_tensor_constant") and k not in before]
        for name in constants:
            delattr(module, name)
    if constants:
        raise CannotTrace(f"forward of {type(module).__name__} makes a tensor of its own, which a trace would freeze")
    if {k: id(v) for k, v in vars(module).items()} != before:
        raise CannotTrace(f"forward of {type(module).__name__} changes the module")
    return graph


class Reader:
    """Reads the nodes of one module's graph."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.calls: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[node.target] = self.calls.get(node.target, 0) + 1

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it is such a call with one argument."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.module.get_submodule(str(node.target))

    def is_identity(self, node: fx.Node) -> bool:
        called = self.called(node)
        if isinstance(called, (nn.Dropout, nn.Dropout2d)):
            return not called.training and hooks_of(called) is None
        return type(called) is nn.Identity and hooks_of(called) is None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            called = self.called(node)
            return type(called) is nn.ReLU and hooks_of(called) is None
        if node.op == "call_function":
            return node.target in RELU_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def add_operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Both operands of a plain sum of two nodes, None for any other node."""
        function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
        method = node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__")
        if not (function or method) or len(node.args) != 2 or node.kwargs:
            return None
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None

    def overwrites_first(self, node: fx.Node) -> bool:
        """Whether a sum is written into its first operand."""
        return node.target in (operator.iadd, "add_", "__iadd__")

    def may_write(self, node: fx.Node) -> bool:
        """Whether a node may write to its inputs: in-place functions and methods, and modules that aren't known not to."""
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
            known = type(called).__module__.startswith(("torch.nn.modules", "resnet_fused.modules"))
            return not known or bool(getattr(called, "inplace", False)) or hooks_of(called) is not None
        name = str(getattr(node.target, "__name__", node.target))
        return name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem", "__iadd__")

    def pool_of(self, node: fx.Node) -> nn.MaxPool2d | None:
        """The max-pool that a node calls, if it has the form that a stem takes."""
        called = self.called(node)
        if type(called) is not nn.MaxPool2d or hooks_of(called) is not None:
            return None
        dilated = called.dilation not in (1, (1, 1))
        return None if dilated or called.ceil_mode or called.return_indices else called

    def next_reader(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a node's result, seen through identities; None if there is none or several."""
        users = list(node.users)
        if len(users) != 1:
            return None
        return self.next_reader(users[0]) if self.is_identity(users[0]) else users[0]

    def producer(self, node: fx.Node) -> fx.Node:
        """The node whose result `node` is, seen back through identities that are its only readers."""
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
        return str(getattr(node.target, "__name__", node.target))

    def format_sensitive_sources(self) -> list[str]:
        """Paths of the modules whose results reach, through functions only, an operation that depends on the memory format."""
        found: list[str] = []
        for node in self.graph.nodes:
            sensitive = node.op == "call_method" and node.target in _FORMAT_SENSITIVE
            if sensitive or (node.op == "call_function" and node.target is torch.as_strided):
                self._sources(node.args[0], found, set())
        return found

    def _sources(self, value: Any, found: list[str], seen: set[fx.Node]) -> None:
        if not isinstance(value, fx.Node) or value in seen:
            return
        seen.add(value)
        if value.op == "call_module":
            if str(value.target) not in found:
                found.append(str(value.target))
            return
        for argument in value.all_input_nodes:
            self._sources(argument, found, seen)
