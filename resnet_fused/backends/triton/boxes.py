"""Which problems tensor descriptors (TMA) serve, and by which boxes of pixels."""

from __future__ import annotations

import functools
import itertools
import math

import torch

from resnet_fused.backends.problem import Problem


def serves(problem: Problem) -> bool:
    """Whether tensor descriptors can serve the problem."""
    (conv,) = problem.convs
    # Strides of a descriptor are multiples of 16 bytes.
    aligned = conv.groups == 1 and conv.in_channels % 8 == 0 and conv.out_channels % 8 == 0
    # A box has every pixel; a strided filter of more than one tap reads every other one.
    dense = conv.stride == (1, 1) or conv.pointwise
    return problem.dtype in (torch.float16, torch.bfloat16) and aligned and dense


def grid_of_pixels(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the result as the kernel sees them: without neighbours, all pixels are one row."""
    (conv,) = problem.convs
    n, _, h, w = problem.output_shape()
    return (1, 1, n * h * w) if conv.pointwise and conv.stride == (1, 1) else (n, h, w)


@functools.cache
def box_of(problem: Problem, pixels: int) -> tuple[int, int, int]:
    """The box (images, rows, columns) of so many pixels that covers the result with the fewest programs.

    Of equal ones the one with the longest rows, whose taps overlap the most.
    """
    size = grid_of_pixels(problem)
    powers = [2**i for i in range(pixels.bit_length())]
    boxes = [box for box in itertools.product(powers, repeat=3) if math.prod(box) == pixels]
    return min(boxes, key=lambda box: (programs(size, box), box[0], -box[2]))


def programs(size: tuple[int, ...], box: tuple[int, ...]) -> int:
    """Boxes that cover the size."""
    return math.prod(math.ceil(a / b) for a, b in zip(size, box, strict=True))
