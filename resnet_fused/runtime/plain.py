"""A fused step in stock PyTorch's ops, layer by layer, on the parameters as the model has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends.activation import activated
from resnet_fused.backends.functions import CONVOLUTIONS, POOLS
from resnet_fused.runtime.program import NONE, FusedStep, Layer


def stock_step(step: FusedStep, parameters: Sequence[Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    """What the step computes, by the ops and in the order in which stock does."""
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


def _sums(layer: Layer, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The convolution with its batch norm."""
    weight, bias, mean, var, gamma, beta = (None if n == NONE else parameters[n] for n in layer.tensors[:6])
    if layer.pad:
        x = F.pad(x, list(layer.pad), layer.pad_mode)
    conv = layer.conv
    assert weight is not None
    y = CONVOLUTIONS[conv.dims](x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, layer.eps) if layer.normed else y
