"""Reads the functions that epilogues have from layers and from the nodes of a trace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.backends import Activation

_LAYERS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation.RELU,
    nn.ReLU6: Activation.RELU6,
    nn.LeakyReLU: Activation.LEAKY_RELU,
    nn.Sigmoid: Activation.SIGMOID,
    nn.SiLU: Activation.SILU,
    nn.Hardsigmoid: Activation.HARDSIGMOID,
    nn.Hardswish: Activation.HARDSWISH,
    nn.GELU: Activation.GELU,
}
_FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), Activation.RELU),
    F.relu6: Activation.RELU6,
    F.leaky_relu: Activation.LEAKY_RELU,
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), Activation.SIGMOID),
    F.silu: Activation.SILU,
    F.hardsigmoid: Activation.HARDSIGMOID,
    F.hardswish: Activation.HARDSWISH,
    F.gelu: Activation.GELU,
}
_METHODS = {
    **dict.fromkeys(("relu", "relu_"), Activation.RELU),
    **dict.fromkeys(("sigmoid", "sigmoid_"), Activation.SIGMOID),
}
_GELUS = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
_STOCK_SLOPE = 0.01  # of F.leaky_relu


def activation_of(layer: nn.Module | None) -> tuple[Activation, float] | None:
    """The function that a layer of PyTorch's own class applies, and its slope below zero."""
    found = _LAYERS.get(type(layer)) if layer is not None else None
    if found is Activation.RELU6 and (layer.min_val, layer.max_val) != (0, 6):  # type: ignore[union-attr]
        return None
    if found is Activation.LEAKY_RELU:
        return _with_slope(layer.negative_slope)  # type: ignore[union-attr]
    if found is Activation.GELU:
        found = _GELUS.get(layer.approximate)  # type: ignore[union-attr, arg-type]
    return None if found is None else (found, 0.0)


def activation_called(node: fx.Node) -> tuple[Activation, float] | None:
    """The function that a node calls on one value, and its slope below zero; None where it takes other arguments of note."""
    table = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op)
    found = table.get(node.target) if table is not None else None  # type: ignore[attr-defined]
    if found is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    given = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if given.pop("out", None) is not None:
        return None
    rest = [*node.args[1:]]
    if found is Activation.LEAKY_RELU:
        slope = rest.pop(0) if rest else given.pop("negative_slope", _STOCK_SLOPE)
        found_with_slope = _with_slope(slope)
    else:
        if found is Activation.GELU:
            approximate = given.pop("approximate", "none")
            named = _GELUS.get(approximate) if isinstance(approximate, str) else None
            if named is None:
                return None
            found = named
        found_with_slope = found, 0.0
    # What may be left is `inplace`.
    return found_with_slope if not given and all(value in (True, False) for value in rest) else None


def _with_slope(slope: object) -> tuple[Activation, float] | None:
    return (Activation.LEAKY_RELU, float(slope)) if isinstance(slope, (int, float)) else None
