"""Tensors that a forward computes from parameters alone, such as a standardised weight: a function of them, made once.

What is computed is what the forward does, by the same functions in the same order, so that a convolution gets the weight that
it has in stock.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fused.fusion.results import is_new, is_repeatable, writes


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from parameters.

    Attributes:
        name: in the place of a parameter's path.
        nodes: that compute it, in their order.
    """

    name: str
    nodes: tuple[fx.Node, ...]

    @property
    def sources(self) -> list[str]:
        """Paths of the parameters."""
        return [*dict.fromkeys(str(node.target) for node in self.nodes if node.op == "get_attr")]

    def value(self, module: nn.Module) -> Tensor:
        """What it is with a module's parameters as they are."""
        values: dict[fx.Node, Any] = {}
        sources = {path: operator.attrgetter(path)(module).detach() for path in self.sources}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in {tensor.device.type for tensor in sources.values()}:
                if torch.amp.is_autocast_available(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            for node in self.nodes:
                if node.op == "get_attr":
                    values[node] = sources[str(node.target)]
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                call = node.target if callable(node.target) else getattr(args[0], node.target)
                values[node] = call(*(args if callable(node.target) else args[1:]), **kwargs)
        value = values[self.nodes[-1]]
        assert isinstance(value, Tensor)
        return value


def derived(node: fx.Node) -> Derived | None:
    """What a node computes, if that is from parameters alone, without random numbers, and nothing writes to it or its parts."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found[current] = None
        if current.op == "get_attr":
            continue
        if current.op not in ("call_function", "call_method") or not is_repeatable(current) or writes(current):
            return None
        pending += current.all_input_nodes
    if node.op == "get_attr" or not any(n.op == "get_attr" for n in found):
        return None
    readers = {user for n in found if n.op != "get_attr" for user in n.users} - found.keys()
    if not all(reader.op == "output" or is_new(reader) for reader in readers):
        return None
    order = [n for n in node.graph.nodes if n in found]
    return Derived(f"({node.name})", tuple(order))
