"""Shapes of the values in a trace, found by running its nodes on tensors without memory (of the device "meta")."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fused.fusion.sandbox import HOOKS

UNKNOWN: Any = object()


class Shapes:
    """The values of nodes, with a tensor without memory in the place of each tensor.

    Args:
        module: the traced module.
        inputs: such tensors for the arguments of its forward.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._module, self._inputs = module, [*inputs]
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a node; UNKNOWN where it can't be told without running code of a model's, or without values."""
        if node not in self._values:
            for earlier in node.graph.nodes:
                if earlier not in self._values:
                    self._values[earlier] = self._run(earlier)
                if earlier is node:
                    break
        return self._values[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[len(self._values)]
        if node.op == "get_attr":
            return without_memory(operator.attrgetter(str(node.target))(self._module))
        if any(self._values[source] is UNKNOWN for source in node.all_input_nodes):
            return UNKNOWN
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            if node.op == "call_module":
                return self._layer(self._module.get_submodule(str(node.target)), args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever meta tensors can't do, or the forward itself can't
            return UNKNOWN

    def _layer(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """The result of a layer of PyTorch's own; of all others, and of those with others in them, nothing is known."""
        if not type(layer).__module__.startswith("torch.nn.modules.") or layer._modules:
            return UNKNOWN
        twin = copy.copy(layer)
        own = vars(twin)
        for name in HOOKS:
            own[name] = OrderedDict()
        for name in ("_parameters", "_buffers"):
            own[name] = {key: None if t is None else without_memory(t) for key, t in getattr(layer, name).items()}
        return type(layer).forward(twin, *args, **kwargs)


def without_memory(x: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype without memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
