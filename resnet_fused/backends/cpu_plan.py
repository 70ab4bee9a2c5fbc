"""How the CPU kernels cut up a Winograd convolution: the cost rule, and the alternatives for a tuner."""

from __future__ import annotations

from typing import NamedTuple

from resnet_fused.backends.problem import Conv, Problem


class Plan(NamedTuple):
    """The numbers that resnet_fused_cpu::conv takes as `plan`; see docs/cpu-kernels.md.

    Attributes:
        output_tile: m of F(m×m, 3×3).
        tiles: tiles that go through the stages together.
        panels: panels of output channels multiplied before their output transform (only where work is split over tiles).
        channel_chunk: input channels whose weights are transformed at once.
        by_panels: whether the work is split over output channels, and not over tiles.
    """

    output_tile: int
    tiles: int
    panels: int
    channel_chunk: int
    by_panels: bool


def serves(conv: Conv) -> bool:
    """Whether the Winograd kernels can compute it: 3×3, stride, padding and dilation 1, one group."""
    return conv[2:] == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def plan(problem: Problem) -> Plan:
    """The plan of the cost rule for a problem of one convolution that Winograd serves."""
    n, channels, h, w = problem.shape
    tiles = n * -(-h // 4) * -(-w // 4)
    if channels <= 256 and tiles >= 96:
        return Plan(4, 8, 4, 64, False)
    return Plan(4, min(tiles, 64), 1, 64, True)
