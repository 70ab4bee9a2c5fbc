"""How tensors of one or three dimensions are seen as images, so that the kernels for images compute convolutions on them.

A view is one of the same memory. Values in three dimensions are channels_last_3d for it, which is (N, D, H, W, C) in memory:
frames in a row, or one image of D rows, each of a whole frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from resnet_fused.backends import Conv, Kernel, Pool, Problem, Step, bounds
from resnet_fused.backends.problem import Shape, Sizes


class View(Enum):
    """How a convolution's input and result are seen."""

    SAME = "same"
    """As they are."""
    ROW = "row"
    """(N, C, L) as an image of one row, (N, C, 1, L)."""
    FRAMES = "frames"
    """(N, C, D, H, W) as images of their own, (N·D, C, H, W), for filters that don't reach along the depth."""
    PIXELS = "pixels"
    """(N, C, D, H, W) as one image, (N, C, D, H·W), for filters that reach along the depth alone."""


def view_of(conv: Conv) -> View:
    """The view in which kernels for images compute a convolution; SAME where it is none for images in any view."""
    if conv.dims == 1:
        return View.ROW
    if conv.dims == 3:
        for view in (View.FRAMES, View.PIXELS):
            if _fits(view, conv.kernel, conv.stride, conv.padding):
                return view
    return View.SAME


def _fits(view: View, kernel: Sizes, stride: Sizes, padding: Sizes) -> bool:
    """Whether a window is one pixel in the dimensions that a view of three gives to other images, or to columns."""
    across = slice(0, 1) if view is View.FRAMES else slice(1, 3)
    return {*kernel[across], *stride[across]} == {1} and {*padding[across]} == {0}


def viewed_pool(pool: Pool, view: View) -> Pool | None:
    """A max-pool as one of images; None where it isn't one in the view."""
    if view is View.SAME and len(pool.kernel) != 2:
        return None
    if view in (View.FRAMES, View.PIXELS) and not _fits(view, *pool):
        return None
    return Pool(*(_sizes(sizes, view, fill) for sizes, fill in zip(pool, (1, 1, 0), strict=True)))


def _sizes(sizes: Sizes, view: View, fill: int) -> Sizes:
    """What a window's sizes are in a view. `fill`: in a dimension that an image of one row has more."""
    if view is View.ROW:
        return fill, *sizes
    if view is View.FRAMES:
        return sizes[1:]
    return sizes[:2] if view is View.PIXELS else sizes


def viewed_problem(problem: Problem, view: View) -> Problem:
    """The problem as it is in a view, on images."""
    if view is View.SAME:
        return problem
    shape, steps = _shape(problem.shape, view), tuple(_step(step, view) for step in problem.steps)
    return replace(problem, steps=steps, shape=shape, memory_format=torch.channels_last)


def _shape(shape: Shape, view: View) -> Shape:
    n, c, *size = shape
    if view is View.ROW:
        return n, c, 1, *size
    d, h, w = size
    return (n * d, c, h, w) if view is View.FRAMES else (n, c, d, h * w)


def _step(step: Step, view: View) -> Step:
    conv, pool = step.operation, step.epilogue.pool
    assert isinstance(conv, Conv)
    kernel, stride, padding, dilation = (_sizes(sizes, view, fill) for sizes, fill in zip(conv[2:6], (1, 1, 0, 1), strict=True))
    if pool is not None:
        step = step._replace(epilogue=step.epilogue._replace(pool=viewed_pool(pool, view)))
    return step._replace(operation=Conv(conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups))


def viewed_weight(weight: Tensor, view: View) -> Tensor:
    """A filter, (out_channels, in_channels / groups, …), as one for images."""
    if view is View.ROW:
        return weight.unsqueeze(2)
    if view is View.FRAMES:
        return weight.squeeze(2)
    return weight.squeeze(4) if view is View.PIXELS else weight


def in_view(kernel: Kernel, view: View) -> Kernel:
    """A kernel on images as one on what the images are a view of."""
    if view is View.SAME:
        return kernel
    see, unsee = _SEE[view], _UNSEE[view]

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = kernel(bounds.same(see(x), x), None if residual is None else bounds.same(see(residual), residual))
        return bounds.same(unsee(y, x.shape), y)

    return run


def all_in_view(run: Callable[..., Sequence[Tensor]], view: View) -> Callable[..., Sequence[Tensor]]:
    """The same of a function of several images with several results."""
    if view is View.SAME:
        return run
    see, unsee = _SEE[view], _UNSEE[view]
    return lambda *given: [unsee(y, given[0].shape) for y in run(*map(see, given))]


def _see_frames(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d).transpose(1, 2).flatten(0, 1)


def _see_pixels(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d).flatten(3)


_SEE: dict[View, Callable[[Tensor], Tensor]] = {
    View.ROW: lambda x: x.unsqueeze(2),
    View.FRAMES: _see_frames,
    View.PIXELS: _see_pixels,
}
# Of a result and the shape of the input.
_UNSEE: dict[View, Callable[[Tensor, torch.Size], Tensor]] = {
    View.ROW: lambda y, shape: y.squeeze(2),
    View.FRAMES: lambda y, shape: y.unflatten(0, (shape[0], shape[2])).transpose(1, 2),
    View.PIXELS: lambda y, shape: y.unflatten(3, shape[3:]),
}
