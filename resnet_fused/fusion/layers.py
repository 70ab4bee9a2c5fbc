"""Reads convolutions and batch norms from the nodes of a trace: their geometry, and the names of their tensors."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fused.backends import Conv
from resnet_fused.fusion.derived import Derived, derived
from resnet_fused.runtime.folding import (
    CONVOLUTIONS,
    NORMS,
    NotFoldable,
    check_conv,
    check_eps,
    check_norm,
    dims_of_norm,
    is_norm,
    probe,
)
from resnet_fused.runtime.views import View, view_of

_FUNCTIONS: dict[Any, int] = {
    **dict.fromkeys((F.conv1d, torch.conv1d), 1),
    **dict.fromkeys((F.conv2d, torch.conv2d), 2),
    **dict.fromkeys((F.conv3d, torch.conv3d), 3),
}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Convolution(NamedTuple):
    """A convolution without what follows it.

    Attributes:
        conv: its geometry.
        pad, pad_mode: what F.pad must add before (left, right, top, bottom; of each dimension, the last one first), for padding
            modes and uneven padding.
        weight, bias: names of its tensors: their paths in the traced module, or of what is derived from parameters.
    """

    conv: Conv
    pad: tuple[int, ...]
    pad_mode: str
    weight: str
    bias: str | None


class Norm(NamedTuple):
    """A batch norm in inference: paths of its tensors, and eps.

    Attributes:
        dims: how many spatial dimensions it takes; None for any number.
        promotes: whether its result has the wider of its input's dtype and its own, as plain arithmetic gives it.
        steps: path of the number of its training steps, which move mean and variance without their version counters.
    """

    mean: str
    var: str
    gamma: str | None
    beta: str | None
    eps: float
    dims: int | None = None
    promotes: bool = False
    steps: str | None = None


def get(module: nn.Module, path: str) -> Any:
    """What stands at a path of attributes inside of a module."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


class Tensors:
    """The tensors of a traced module by their paths, and what its forward derives from them by names of their own.

    Attributes:
        derived: by name, what of that is used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.derived: dict[str, Derived] = {}
        self._values: dict[str, Tensor] = {}

    def name(self, value: Any) -> str | None:
        """Name of the tensor that a node is, if it depends on parameters alone; None for anything else."""
        path = _attribute(value)
        if path is not None or not isinstance(value, fx.Node):
            return path
        found = derived(value)
        if found is None:
            return None
        self.derived[found.name] = found
        return found.name

    def __getitem__(self, name: str) -> Any:
        """The tensor of a name, as it is now."""
        if name not in self.derived:
            return get(self.module, name)
        if name not in self._values:
            self._values[name] = self.derived[name].value(self.module)
        return self._values[name]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def convolution(tensors: Tensors, node: fx.Node) -> Convolution | None:
    """The convolution that a node computes; None if it computes something else.

    Raises:
        NotFoldable: it is one that can't be served; the message is the reason.
    """
    if node.op == "call_module":
        called = tensors.module.get_submodule(str(node.target))
        if not isinstance(called, CONVOLUTIONS):
            return None
        conv = check_conv(called)
        if "forward" in vars(conv):
            raise NotFoldable("the convolution has a forward of its own")
        if len(node.args) != 1 or node.kwargs:
            raise NotFoldable("it is called with more than its input")
        path = str(node.target)
        bias = None if conv.bias is None else _join(path, "bias")
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            # Then stock pads by what it noted when the layer was made, whatever `padding` is now.
            sides = conv._reversed_padding_repeated_twice
            padding = tuple(zip(sides[-2::-2], sides[::-2], strict=True))
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        return _convolution(conv.weight, _join(path, "weight"), bias, *geometry, conv.padding_mode)
    dims = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if dims is None:
        return None
    given = {**dict(zip(_CONV_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    weight, bias = tensors.name(given.get("weight")), tensors.name(given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None) or not node.args:
        raise NotFoldable(f"F.conv{dims}d is called with a weight that is no parameter")
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    geometry = tuple(given.get(name, value) for name, value in defaults.items())
    if any(
        isinstance(value, fx.Node)
        for value in itertools.chain(*(g if isinstance(g, (tuple, list)) else (g,) for g in geometry))
    ):
        raise NotFoldable(f"F.conv{dims}d is called with a geometry that depends on its input")
    tensor = tensors[weight]
    if tensor.dim() != dims + 2 or not tensor.is_floating_point() or tensor.is_meta:
        raise NotFoldable(f"its weight is no floating-point tensor of {dims + 2} dimensions")
    return _convolution(tensor, weight, bias, *geometry, "zeros")


def _attribute(value: Any) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _convolution(
    tensor: Tensor, weight: str, bias: str | None, stride: Any, padding: Any, dilation: Any, groups: int, padding_mode: str
) -> Convolution:
    kernel = tensor.shape[2:]

    def each(value: Any) -> tuple[Any, ...]:
        """One value for each dimension."""
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values * len(kernel) if len(values) == 1 else values

    stride, dilation = each(stride), each(dilation)
    if not len(stride) == len(dilation) == len(kernel) or not (isinstance(padding, str) or len(each(padding)) == len(kernel)):
        raise NotFoldable("its geometry isn't of its number of dimensions, which stock refuses")
    if padding == "same" and {*stride} != {1}:
        raise NotFoldable("padding is 'same' and the stride not 1, which stock refuses")
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        # As stock: an odd number puts the extra pixel at the end.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(int(p[0]), int(p[1])) if isinstance(p, tuple) else (int(p), int(p)) for p in each(padding)]
    even = [before for before, after in sides if before == after]
    if padding_mode == "zeros" and len(even) == len(sides):
        conv = Conv.of(tensor, stride, even, dilation, groups)
        sides = []
    else:
        conv = Conv.of(tensor, stride, (0,) * len(kernel), dilation, groups)
    pad = tuple(itertools.chain(*sides[::-1])) if any(map(sum, sides)) else ()
    if conv.dims == 3 and padding_mode != "zeros":
        raise NotFoldable(f"padding_mode is {padding_mode!r} in three dimensions")
    if conv.dims == 3 and view_of(conv) is View.SAME and {*conv.dilation} != {1}:
        raise NotFoldable("its filter is dilated in three dimensions, where oneDNN was seen to crash on some")
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return Convolution(conv, pad, mode, weight, bias)


def norm(module: nn.Module, node: fx.Node) -> Norm | None:
    """The batch norm that a node computes; None if it computes something else.

    Raises:
        NotFoldable: it is one that can't be folded; the message is the reason.
    """
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if not is_norm(called) or len(node.args) != 1 or node.kwargs:
            return None
        check_norm(called)
        if "forward" in vars(called):
            raise NotFoldable("the batch norm has a forward of its own")
        probe(called)
        names = {n: _join(str(node.target), n) for n in ("running_mean", "running_var", "weight", "bias")}
        gamma, beta = (names[n] if getattr(called, n, None) is not None else None for n in ("weight", "bias"))
        # detectron's first FrozenBatchNorm2d had no eps; the probe tells whether 0 is what it computes with.
        counted = getattr(called, "num_batches_tracked", None) is not None
        count = _join(str(node.target), "num_batches_tracked") if counted else None
        promotes = not isinstance(called, (*NORMS, nn.SyncBatchNorm))
        eps = float(getattr(called, "eps", 0.0))
        return Norm(names["running_mean"], names["running_var"], gamma, beta, eps, dims_of_norm(called), promotes, count)
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given = {**dict(zip(_NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    mean, var, gamma, beta = (_attribute(given.get(n)) for n in _NORM_ARGUMENTS[1:5])
    if given.get("training", False) is not False or mean is None or var is None:
        raise NotFoldable("the batch norm is in training mode; call model.eval() first")
    for name, path in (("weight", gamma), ("bias", beta)):
        if path is None and given.get(name) is not None:
            raise NotFoldable(f"the batch norm's {name} is no parameter")
    given_eps: Any = given.get("eps", 1e-5)
    check_eps(given_eps)
    return Norm(mean, var, gamma, beta, float(given_eps))
