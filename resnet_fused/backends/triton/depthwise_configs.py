"""Tiles of the depthwise kernel, each with why it is there, and the choice among them without timing; see configs.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton.chip import Chip

COLUMNS = 4
"""Pixels side by side that a thread computes."""

_LARGEST_FILTER = 7
_LATENCY = 4.0


@dataclass(frozen=True)
class DepthwiseTile:
    """One entry of the table.

    Attributes:
        rows: of pixels of a tile.
        threads: along a row, each with COLUMNS pixels.
        lanes: threads along the channels, each with 16 bytes of them.
        why: what the entry is good for.
    """

    rows: int
    threads: int
    lanes: int
    why: str

    @property
    def warps(self) -> int:
        return self.rows * self.threads * self.lanes // 32


TABLE = (
    DepthwiseTile(8, 4, 8, "large images: 8 rows share what they read, 10 with the halo of 3×3"),
    DepthwiseTile(8, 4, 4, "the first layers, of 16 to 32 channels"),
    DepthwiseTile(4, 4, 8, "14×14: 16×16 pixels in four programs"),
    DepthwiseTile(8, 2, 8, "7×7: 8×8 pixels"),
    DepthwiseTile(2, 4, 8, "more programs: small batch"),
    DepthwiseTile(2, 2, 8, "the most programs: 7×7 at batch 1"),
)


@dataclass(frozen=True)
class DepthwisePlan:
    """A tile applied to a problem.

    Attributes:
        tile: the entry of the table.
        channels: of a program.
    """

    tile: DepthwiseTile
    channels: int

    @property
    def name(self) -> str:
        """As the tuning cache spells it."""
        t = self.tile
        return f"depthwise-{t.rows}x{t.threads * COLUMNS}x{self.channels}-w{t.warps}"

    @property
    def packing(self) -> tuple[object, ...]:
        """What packed weights depend on."""
        return ("depthwise",)

    def precision(self, chip: Chip, tf32: bool) -> str:
        """What float32 is multiplied in."""
        return "ieee"

    def programs(self, problem: Problem) -> int:
        n, c, oh, ow = problem.output_shape()
        tile = self.tile
        return n * math.ceil(oh / tile.rows) * math.ceil(ow / (tile.threads * COLUMNS)) * math.ceil(c / self.channels)


def serves(conv: Conv) -> bool:
    """Whether the depthwise kernel computes a convolution: one channel a group, and small filters without dilation."""
    small = max(conv.kernel) <= _LARGEST_FILTER and conv.stride in ((1, 1), (2, 2)) and conv.dilation == (1, 1)
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels and small


def plans(problem: Problem, chip: Chip) -> list[DepthwisePlan]:
    """Every plan of the table, the most promising first."""
    vector = 16 // problem.types.source.itemsize
    found = [DepthwisePlan(tile, tile.lanes * vector) for tile in TABLE]
    return sorted(found, key=lambda plan: cost(plan, problem, chip))


def cost(plan: DepthwisePlan, problem: Problem, chip: Chip) -> float:
    """Modelled time, in units of what the warps of an SM take for one program of a warp.

    All threads do the same work. Rows of windows that lie in two tiles are read twice from L2.
    """
    conv, rows = problem.conv, plan.tile.rows * problem.conv.stride[0]
    halo = (conv.kernel[0] - conv.stride[0]) / rows
    return _LATENCY + math.ceil(plan.programs(problem) / chip.multiprocessors) * plan.tile.warps * (1 + max(halo, 0.0) / 4)
