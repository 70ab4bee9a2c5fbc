"""A fused step in stock PyTorch's ops, layer by layer, on the parameters as the model has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends.activation import activated
from resnet_fused.backends.functions import CONVOLUTIONS, POOLS
from resnet_fused.backends.problem import Pointwise
from resnet_fused.runtime.program import NONE, FusedStep, Layer


def stock_step(
    step: FusedStep, parameters: Sequence[Tensor], x: Tensor, residual: Tensor | None, more: Sequence[Tensor] = ()
) -> Tensor:
    """What the step computes, by the ops and in the order in which stock does."""
    if step.is_pass:
        return _pass(step.layers[0], parameters, x, residual, more)
    values = [x, residual]
    for layer in step.layers:
        source, *added = (values[number] for number in layer.reads)
        assert source is not None
        y = _sums(layer, parameters, source)
        if added:
            assert added[0] is not None
            y = y + added[0]
        y = activated(y, layer.epilogue, inplace=True)
        values.append(y if layer.epilogue.pool is None else POOLS[layer.conv.dims](y, *layer.epilogue.pool))
    assert values[-1] is not None
    return values[-1]


def _pass(layer: Layer, parameters: Sequence[Tensor], x: Tensor, residual: Tensor | None, more: Sequence[Tensor]) -> Tensor:
    """A gate, or a batch norm by itself, and what follows."""
    gate: Tensor | None = None
    if layer.epilogue.gate:
        *more, gate = more
    if layer.operation is not Pointwise.IDENTITY:
        mean, var, gamma, beta = (None if n == NONE else parameters[n] for n in layer.tensors[2:6])
        x = F.batch_norm(torch.cat((x, *more), 1) if more else x, mean, var, gamma, beta, False, 0.0, layer.eps)
    if gate is not None:
        x = x * gate
    if residual is not None:
        x = x + residual
    return activated(x, layer.epilogue, inplace=True)


def _sums(layer: Layer, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The convolution with its batch norm."""
    weight, bias, mean, var, gamma, beta = (None if n == NONE else parameters[n] for n in layer.tensors[:6])
    if layer.pad:
        x = F.pad(x, list(layer.pad), layer.pad_mode)
    conv = layer.conv
    assert weight is not None
    y = CONVOLUTIONS[conv.dims](x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, layer.eps) if layer.normed else y
