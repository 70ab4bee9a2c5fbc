"""A fused step in stock PyTorch's ops, on the parameters as the model has them: by layers, or by the calls that it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.backends.activation import activated
from resnet_fused.backends.functions import CONVOLUTIONS, POOLS
from resnet_fused.backends.problem import Pointwise
from resnet_fused.runtime.formats import in_format
from resnet_fused.runtime.program import NONE, Call, FusedStep, Layer, Program, caller


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


def plain_layers(step: FusedStep, parameters: Sequence[Tensor]) -> Callable[..., Any]:
    """The step as a function of what it reads, layer by layer."""
    if step.residual == NONE:
        return lambda x, *more: stock_step(step, parameters, x, None, more)
    return lambda x, residual, *more: stock_step(step, parameters, x, residual, more)


def plain_padded(step: FusedStep, parameters: Sequence[Tensor]) -> Callable[..., Any]:
    """A step of one layer as a function of an input that is padded already, and the residual; the result is channels_last."""
    (layer,) = step.layers
    padded = step._replace(layers=(layer._replace(pad=()),))

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return in_format(stock_step(padded, parameters, x, residual), torch.channels_last)

    return run


def plain_calls(program: Program, module: nn.Module | None) -> Callable[..., Any]:
    """A program of calls alone as a function of its inputs; `module`: whose forward it is."""
    callers = [(caller(call, module), call.reads) for call in program.items if isinstance(call, Call)]
    output = program.outputs.number

    def run(*given: Any) -> Any:
        values = [*given]
        for function, reads in callers:
            values.append(function(*[values[read] for read in reads]))
        return values[output]

    return run


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
