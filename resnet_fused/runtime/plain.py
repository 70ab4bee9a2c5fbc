"""A step in stock PyTorch's ops, layer by layer, on the parameters as the model has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.runtime.program import NONE, Layer, Step


def stock_step(step: Step, parameters: Sequence[Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    """What the step computes, by the ops and in the order in which stock does."""
    layers = [*step.layers]
    if step.op in ("basic_block", "bottleneck"):
        residual = _layer(layers.pop(), parameters, x) if step.shortcut else x
    *inner, last = layers
    for layer in inner:
        x = _layer(layer, parameters, x).relu_()
    y = _layer(last, parameters, x)
    if residual is not None:
        y = y + residual
    if step.op != "conv2d_bn":
        y = y.relu_()
    return y if step.pool is None else F.max_pool2d(y, *step.pool)


def _layer(layer: Layer, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    weight, bias, mean, var, gamma, beta = (None if n == NONE else parameters[n] for n in layer.tensors[:6])
    if layer.pad:
        x = F.pad(x, list(layer.pad), layer.pad_mode)
    conv = layer.conv
    assert weight is not None
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, layer.eps) if layer.normed else y
