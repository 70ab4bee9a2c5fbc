"""Memory formats: which one a result has in stock, and tensors in exactly one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.backends import Activation
from resnet_fused.backends.problem import FIRST_RESULT, X
from resnet_fused.runtime.calls import memory_format
from resnet_fused.runtime.program import FusedStep, Layer


def result_format(
    step: FusedStep, x: Tensor, format: torch.memory_format | None, parameters: Sequence[Tensor]
) -> torch.memory_format:
    """The memory format that a fused step's result has in stock.

    Args:
        step: the step.
        x: its input.
        format: of x in stock; None: that which x has.
        parameters: the program's.
    """
    if step.is_pass:
        return memory_format(x) if format is None else format
    # The strides of one value an image tell nothing.
    one = math.prod(x.shape[1:]) == 1
    given = memory_format(x) == torch.channels_last if format is None else format == torch.channels_last and not one
    # Whether a value is channels_last, and its spatial size, by its number. Of a sum they are those of its first operand.
    values: dict[int, tuple[bool, tuple[int, ...]]] = {X: (given, x.shape[2:])}
    for number, layer in enumerate(step.layers, FIRST_RESULT):
        channels_last, size = values[layer.reads[0]]
        weight = parameters[layer.tensors[0]]
        # In one dimension the input is made contiguous.
        channels_last = (channels_last and layer.conv.dims > 1) or memory_format(weight) == torch.channels_last
        if channels_last and layer.conv.dims == 3:
            channels_last = _keeps_channels_last_3d((x.shape[0], layer.conv.in_channels, *size), x, layer, weight)
        size = layer.conv.output_size(*size)
        values[number] = channels_last, size
        one, single = math.prod(size) == 1, layer.conv.out_channels == 1
        if not layer.normed:
            # Where both formats hold, what makes a new tensor makes a contiguous one.
            values[number] = channels_last and not (layer.renews and (one or single)), size
            continue
        if layer.conv.dims == 1:
            values[number] = False, size  # a batch norm in one dimension knows but contiguous results
            continue
        # Where both formats hold, stock's batch norm gives a contiguous result; one written out in sums and products does for
        # one value a channel alone.
        if (one and (x.shape[0] == 1 or not layer.promotes)) or (single and not layer.promotes):
            # On a GPU it is that of what follows and makes a new tensor, but for ReLU6, which makes one like its input.
            follows = layer.epilogue
            kept = not layer.renews or (follows.activation is Activation.RELU6 and not follows.residual)
            values[number] = channels_last and x.is_cuda and kept, size
    return torch.channels_last if values[FIRST_RESULT + len(step.layers) - 1][0] else torch.contiguous_format


def _keeps_channels_last_3d(shape: Sequence[int], like: Tensor, layer: Layer, weight: Tensor) -> bool:
    """Whether stock's convolution of a channels_last_3d tensor gives one, which depends on the library that it takes."""
    conv = layer.conv
    x = torch.empty_strided(shape, strides_in(shape, torch.channels_last), dtype=like.dtype, device=like.device)
    weight = torch.empty_strided(weight.shape, weight.stride(), dtype=like.dtype, device=like.device)
    geometry = ([*conv.stride], [*conv.padding], [*conv.dilation], False, [0] * conv.dims, conv.groups)
    library = torch._C._select_conv_backend(x, weight, None, *geometry, None)
    return torch._C._conv_determine_backend_memory_format(x, weight, library) == torch.channels_last_3d


def in_format(y: Tensor, format: torch.memory_format | None, always: bool = False) -> Tensor:
    """y with exactly the strides of a new tensor of the format; y itself where it has them, or `format` is None.

    Args:
        y: any tensor.
        format: the format.
        always: make a new tensor even where y has these strides.
    """
    if format is None or not 3 <= y.dim() <= 5:
        return y
    strides = strides_in(y.shape, format)
    if not always and y.stride() == strides:
        return y
    if not always and all(size == 1 or own == given for size, own, given in zip(y.shape, strides, y.stride(), strict=True)):
        return y.as_strided(y.shape, strides)  # they differ only where a size is 1
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def strides_in(shape: Sequence[int], format: torch.memory_format) -> tuple[int, ...]:
    """Strides of a new tensor, (N, C, …), in a format; channels_last is channels in the last place, of whatever dimensions."""
    strides, step = [0] * len(shape), 1
    inner = [*range(len(shape) - 1, 0, -1)] if format == torch.contiguous_format else [1, *range(len(shape) - 1, 1, -1)]
    for dim in (*inner, 0):
        strides[dim], step = step, step * shape[dim]
    return tuple(strides)


def format_of(x: Tensor) -> torch.memory_format | None:
    """The memory format of a tensor as a result of stock's would have it; None if it has neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if channels_are_last(x) else None


def channels_are_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def same_in_both(x: Tensor) -> bool:
    """Whether a tensor's sizes make contiguous and channels_last the same."""
    return 3 <= x.dim() <= 5 and (x.shape[1] == 1 or math.prod(x.shape[2:]) == 1)
