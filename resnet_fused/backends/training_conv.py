"""What a backend computes for a convolution in training: y, the gradient of x and the gradient of the weights, each or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused.backends import STOCK, BackendError, choice, resolve
from resnet_fused.backends.parameters import NO_PARAMETERS
from resnet_fused.backends.problem import Conv, Problem, Shape, TrainingConv


class TrainingConvKernels(NamedTuple):
    """The kernels for one problem; None where stock's is used.

    Attributes:
        forward: y from x and the weights, channels_last.
        input_gradient: that of x, channels_last, from the gradient of y, the weights, and height and width of x.
        weight_gradient: that of the weights in float32, channels_last, from x and the gradient of y.
        saves_most: whether y is worth copies of tensors into channels_last.
    """

    forward: Callable[[Tensor, Tensor], Tensor] | None = None
    input_gradient: Callable[[Tensor, Tensor, tuple[int, int]], Tensor] | None = None
    weight_gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    saves_most: bool = False

    @property
    def serves(self) -> bool:
        """Whether one of them is faster than stock's, in channels_last."""
        return self.forward is not None or self.weight_gradient is not None


STOCKS = TrainingConvKernels()

# A batch of a ResNet's training: what is asked for where an input's size isn't known.
_TYPICAL_BATCH, _TYPICAL_SIZE = 16, 56


def training_conv(x: Tensor, weight_shape: tuple[int, ...], stride: int, padding: int) -> TrainingConvKernels:
    """The kernels of the backend chosen for a convolution without dilation, of square kernel, on x."""
    return _kernels(tuple(x.shape), weight_shape, stride, padding, x.dtype, x.device, choice())


def serves_at_any_size(
    device_type: str, dtype: torch.dtype, channels: int, weight_shape: tuple[int, ...], stride: int, padding: int
) -> tuple[bool, bool]:
    """`saves_most` and `serves` for inputs of a size that isn't known yet, by a typical one."""
    shape = (_TYPICAL_BATCH, channels, _TYPICAL_SIZE, _TYPICAL_SIZE)
    found = _kernels(shape, weight_shape, stride, padding, dtype, torch.device(device_type), choice())
    return found.saves_most, found.serves


# As in batch_norm.py: torch.compile takes the result as a constant. For `training_conv` it would have to compute x.
serves_at_any_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=512)
def _kernels(
    shape: Shape,
    weight_shape: tuple[int, ...],
    stride: int,
    padding: int,
    dtype: torch.dtype,
    device: torch.device,
    chosen: str,
) -> TrainingConvKernels:
    out_channels, of_group, kernel = weight_shape[:3]
    groups = shape[1] // of_group
    conv = Conv(shape[1], out_channels, (kernel, kernel), (stride, stride), (padding, padding), groups=groups)
    problem = Problem.of(TrainingConv(conv), shape, dtype, device)
    try:
        backend = resolve(problem, chosen)
    except BackendError:  # who chose a backend chose it for the ops; that a convolution in training is stock's is no error
        return STOCKS
    return STOCKS if backend.name == STOCK else cast(TrainingConvKernels, backend.prepare(problem, NO_PARAMETERS))
