"""Matches what is no convolution, and is computed in one pass: gates of squeeze-and-excite, and batch norms by themselves."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.fusion.layers import norm
from resnet_fused.fusion.matches import PassMatch
from resnet_fused.runtime.folding import NotFoldable

if TYPE_CHECKING:
    from resnet_fused.fusion.matching import Matcher

_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_PRODUCT_METHODS = ("mul", "mul_", "__mul__", "__imul__")
_IN_PLACE = (operator.imul, "mul_", "__imul__")
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# Nodes that a gate is made by from the mean over pixels: as many as there are between them in known networks, and some more.
_LONGEST_GATE = 24
_GATE_LAYERS = (
    nn.Conv2d,
    nn.Conv1d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.BatchNorm1d,
    nn.LayerNorm,
    nn.Flatten,
    nn.Unflatten,
    nn.Softmax,
)
_GATE_FUNCTIONS = (F.conv2d, F.conv1d, F.linear, F.batch_norm, torch.flatten, F.softmax, torch.softmax, operator.getitem)
_GATE_METHODS = ("view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "flatten", "expand_as", "expand", "softmax")


def match_gate(matcher: Matcher, node: fx.Node) -> PassMatch | None:
    """The gate that a product applies: one value times what was made of a mean over all pixels, of it or of another value."""
    function = node.op == "call_function" and node.target in _PRODUCTS
    method = node.op == "call_method" and node.target in _PRODUCT_METHODS
    if not (function or method) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    for x, gate in ((a, b), (b, a)):
        covered = [node]
        if _expands(gate, x) and not matcher.written_between(gate, node):
            covered.insert(0, gate)
            gate = gate.args[0]  # type: ignore[assignment]
        if not _is_pooled(matcher, gate) or _is_pooled(matcher, x):
            continue
        if node.target in _IN_PLACE and not (x is a and _read_last(matcher, x, node)):
            return None
        return PassMatch(f"the product {node.name}", covered, [x], gate=gate)
    return None


def _expands(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is what `expand_as` makes of a gate for x, and nothing else reads it."""
    called = node.op == "call_method" and node.target == "expand_as" and len(node.users) == 1
    return called and len(node.args) == 2 and isinstance(node.args[0], fx.Node) and node.args[1] is x


def _read_last(matcher: Matcher, x: fx.Node, node: fx.Node) -> bool:
    """Whether nobody sees that a product isn't written into x: x is a new tensor, whose other readers come before."""
    return x in matcher.by_last and all(matcher.order[user] <= matcher.order[node] for user in x.users)


def _is_pooled(matcher: Matcher, node: fx.Node) -> bool:
    """Whether a value was made, by layers and functions that a gate may have, of a mean over all pixels."""
    for _ in range(_LONGEST_GATE):
        if _is_mean(matcher, node):
            return True
        source = _source(matcher, node)
        if source is None:
            return False
        node = source
    return False


def _is_mean(matcher: Matcher, node: fx.Node) -> bool:
    if node.op == "call_module":
        called = matcher.called(node)
        return isinstance(called, nn.AdaptiveAvgPool2d) and called.output_size in (1, (1, 1))
    return node.target in ("mean", torch.mean, F.adaptive_avg_pool2d)


def _source(matcher: Matcher, node: fx.Node) -> fx.Node | None:
    """What a node of a gate is made of; None for a node that gates don't have."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        called = matcher.called(node)
        known = isinstance(called, _GATE_LAYERS) or matcher.is_identity(node)
    else:
        table: Any = {"call_function": _GATE_FUNCTIONS, "call_method": _GATE_METHODS}.get(node.op, ())
        known = node.target in table
    return source if known or matcher.activation(node) is not None else None


def match_norm(matcher: Matcher, node: fx.Node) -> PassMatch | None:
    """A batch norm that follows no convolution, with a concatenation before it that nothing else reads."""
    x = node.args[0] if node.args else None
    try:
        found = norm(matcher.module, node) if isinstance(x, fx.Node) else None
    except NotFoldable:
        return None
    if found is None or found.promotes or found.dims not in (None, 2) or not isinstance(x, fx.Node):
        return None
    name, parts = f"the batch norm {node.name}", _concatenated(x)
    if parts is not None and [*x.users] == [node]:
        return PassMatch(name, [x, node], parts, norm=found)
    return PassMatch(name, [node], [x], norm=found)


def _concatenated(node: fx.Node) -> list[fx.Node] | None:
    """What a node concatenates along channels; None if it does something else."""
    if node.op != "call_function" or node.target not in _CONCATENATIONS:
        return None
    given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts = given.pop("tensors", None)
    if given not in ({"dim": 1}, {"dim": -3}) or not isinstance(parts, (tuple, list)) or len(node.args) > 2 or not parts:
        return None
    return [*parts] if all(isinstance(part, fx.Node) for part in parts) else None
