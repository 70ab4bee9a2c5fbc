"""Whether kernels run as they stand in the graph of a frozen model: operators of tensors, registered from C++, without a state.

Only backends with `freezes` serve there, and a kernel of theirs that is registered from Python calls such operators instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

_freezing: ContextVar[bool] = ContextVar("resnet_fused_freezing", default=False)


@contextlib.contextmanager
def freeze_kernels() -> Iterator[None]:
    """Within the `with` block, kernels are found and run in their frozen form."""
    token = _freezing.set(True)
    try:
        yield
    finally:
        _freezing.reset(token)


def freezing() -> bool:
    """Whether this is within `freeze_kernels`."""
    return _freezing.get()


def checked_input(namespace: str, x: Tensor, example: Tensor) -> Tensor:
    """A copy of x with the strides of `example`; the library's operator raises where x has another shape, dtype or device."""
    frozen_input = getattr(torch.ops, namespace).frozen_input
    return frozen_input(x, [*example.shape], [*example.stride()], example.dtype)


# ---- shapes of results --------------------------------------------------------------------------------------------------


def register_fakes(namespace: str, fakes: Mapping[str, Callable[..., Tensor]]) -> None:
    """Tells PyTorch the operators' results without memory, once the library is loaded; each library has `frozen_input`."""
    for name, fake in {"frozen_input": _input, **fakes}.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


def channels_last_result(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A result for the images of x."""
    n = x.shape[0]
    return x.new_empty_strided((n, channels, height, width), (channels * height * width, 1, width * channels, channels))


def output_size(x: Tensor, geometry: Sequence[int]) -> list[int]:
    """Height and width of a convolution's result; `geometry` is kernel, stride, padding and dilation, two each."""
    return [
        (x.shape[2 + d] + 2 * geometry[4 + d] - geometry[6 + d] * (geometry[d] - 1) - 1) // geometry[2 + d] + 1 for d in (0, 1)
    ]


def _input(x: Tensor, shape: list[int], strides: list[int], dtype: torch.dtype) -> Tensor:
    if [*x.shape] != shape or x.dtype != dtype:
        raise ValueError(
            f"an input has shape {tuple(x.shape)} and dtype {x.dtype}; the model was frozen for {tuple(shape)} and {dtype}. "
            "Give it such a tensor, or freeze the model for this one."
        )
    return x.new_empty_strided(shape, strides)
