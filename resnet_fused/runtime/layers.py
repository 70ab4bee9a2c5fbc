"""Finds kernels for layers that aren't fused with another: the mean over all pixels, and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.backends import NO_PARAMETERS, ConvParameters, Kernel, Problem, choice
from resnet_fused.backends.binding import Bound, bind_if_better
from resnet_fused.backends.problem import Conv, Linear, Pointwise
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.program import Call, Value
from resnet_fused.runtime.run import without_residual


class Mean(NamedTuple):
    """A call that takes the mean over all pixels of each channel.

    Attributes:
        keeps: whether the result has four dimensions, and not two.
        as_input: whether its format in stock is that of its input; otherwise it is contiguous.
    """

    keeps: bool
    as_input: bool


_PIXELS = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
_ONE = (1, (1, 1), [1, 1])


def mean_of(call: Call, layer: nn.Module | None) -> Mean | None:
    """What a call computes, if it is such a mean; `layer` is the layer that it calls."""
    if call.kind == "call_module":
        return Mean(True, True) if type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in _ONE else None
    names = ("x", "dim", "keepdim") if call.target in ("mean", torch.mean) else ("x", "output_size")
    given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    if len(call.args) > len(names) or type(call.args[0] if call.args else None) is not Value:
        return None
    if call.target is F.adaptive_avg_pool2d:
        return Mean(True, True) if {*given} == {*names} and given["output_size"] in _ONE else None
    if call.target not in ("mean", torch.mean) or not {*given} <= {*names}:
        return None
    dims, keeps = given.get("dim"), given.get("keepdim", False)
    whole = isinstance(dims, (tuple, list)) and len(dims) == 2 and {*dims} in _PIXELS
    return Mean(keeps, False) if whole and isinstance(keeps, bool) else None


def bind_mean(x: Any, backend: str) -> Bound | None:
    """The kernel of the mean over all pixels of x; None where stock's is as good."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.dim() != 4 or x.numel() == 0:
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    n, c, h, w = x.shape
    problem = Problem.of(Pointwise.AVERAGE_POOL, (n, c, h, w), x.dtype, x.device)
    return bind_if_better(problem, NO_PARAMETERS, choice(backend))


class BoundLinear(NamedTuple):
    """A linear layer with its kernel. `run`: the layer as a function of its input."""

    problem: Problem
    bound: Bound
    parameters: ConvParameters
    run: Callable[[Tensor], Tensor]


def bind_linear(layer: nn.Linear, x: Tensor, as_stock: bool, folded: Parameters, backend: str) -> BoundLinear | None:
    """The kernel of a linear layer on x; None where stock's is as good.

    Args:
        layer: the layer.
        x: its input.
        as_stock: whether x has the strides that it has in stock.
        folded: where packed parameters are kept.
        backend: as users choose it.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or bias is None or weight.numel() == 0 or x.dim() < 2 or x.numel() == 0:
        return None
    if not x.dtype == weight.dtype == bias.dtype or x.device != weight.device or x.shape[-1] != weight.shape[1]:
        return None
    outside, inside = weight.shape
    pixels = x.dim() > 2
    if not pixels:
        problem = Problem.of(Linear(inside, outside), (x.shape[0], inside, 1, 1), x.dtype, x.device)
    # On (…, features), such as ConvNeXt's on images with channels last, a 1×1 convolution of one row: on CPUs in float32, where
    # our kernel was faster than stock's on ConvNeXt-T (Zen 4, batch 1 and 8).
    elif x.device.type == "cpu" and x.dtype == torch.float32 and as_stock and x.is_contiguous():
        problem = Problem.of(Conv(inside, outside, (1, 1)), (1, inside, 1, x.numel() // inside), x.dtype, x.device)
    else:
        return None
    parameters = folded.linear(weight, bias)
    bound = bind_if_better(problem, parameters, choice(backend))
    if bound is None:
        return None
    return BoundLinear(problem, bound, parameters, (_of_pixels if pixels else without_residual)(bound.kernel))


def _of_pixels(kernel: Kernel) -> Callable[[Tensor], Tensor]:
    """A 1×1 convolution as a function of contiguous (…, features)."""

    def run(x: Tensor) -> Tensor:
        y = kernel(x.view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2), None)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])

    return run
