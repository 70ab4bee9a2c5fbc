"""Tile configurations of the convolution kernel, each with why it is there, and the choice among them without timing.

Nothing here was timed on a GPU. Registers, spills, instructions and shared memory of every entry were counted, and are held by
tests/ptx/triton; the choice is a model, which `rf.tune` replaces by measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from resnet_fused.backends.problem import Conv, Problem

# How the kernel walks over the filter; the kernel's own constants of the same names.
POINTWISE, TAPS, ROWS = 0, 1, 2

_SMALLEST_BLOCK_K = 32
_MOST_LANES_OF_A_ROW = 128
_MOST_SPLITS = 16
_FEWEST_STEPS_OF_A_SPLIT = 4


@dataclass(frozen=True)
class Chip:
    """What the choice depends on.

    Attributes:
        vendor: "cuda" or "hip".
        capability: compute capability as major · 10 + minor (CUDA); the gfx number (HIP).
        multiprocessors: number of SMs or compute units.
        shared_limit: shared memory that one program may use, in bytes.
    """

    vendor: str
    capability: int
    multiprocessors: int
    shared_limit: int

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton drives this chip's matrix units: from compute capability 8.0 on (not on 7.5), and on AMD's CDNA."""
        return self.vendor == "hip" or self.capability >= 80

    @property
    def buffers_per_stage(self) -> tuple[int, int]:
        """(a, b) so that a pipeline of s stages keeps a·s + b tiles in shared memory: mma.sync reads the oldest into registers."""
        return (1, 0) if self.vendor == "cuda" and self.capability in (90, 100, 103) else (1, -1)

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Chip:
        """The chip of a device; an A100 for the interpreter's CPU tensors."""
        if device.type == "cpu":
            return cls("cuda", 80, 108, 166912)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            number = int(properties.gcnArchName.split(":")[0].removeprefix("gfx"), 16)
            return cls("hip", number, properties.multi_processor_count, properties.shared_memory_per_block)
        capability = properties.major * 10 + properties.minor
        return cls("cuda", capability, properties.multi_processor_count, properties.shared_memory_per_block_optin)


@dataclass(frozen=True)
class Tile:
    """One entry of the table.

    Attributes:
        m: output pixels of a tile.
        n: output channels of a tile.
        k: elements of the reduction in one step of the main loop.
        warps: warps of a program.
        stages: depth of the software pipeline.
        why: what the entry is good for.
        since: lowest compute capability that it is meant for.
        residual: whether it fits the registers with a residual too.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    why: str
    since: int = 80
    residual: bool = True

    def shared_bytes(self, chip: Chip, itemsize: int) -> int:
        """Shared memory of the main loop's tiles, in bytes."""
        a, b = chip.buffers_per_stage
        return (a * self.stages + b) * (self.m + self.n) * self.k * itemsize


# float16 and bfloat16. Warp tiles of 64×64 (128×128 by 4 warps) need the fewest shared-memory reads per mma.
HALF = (
    Tile(128, 256, 64, 8, 3, "widest tile: 85 flop per byte read; res4 and res5 at large batch", residual=False),
    Tile(256, 128, 32, 8, 3, "as wide, for K of 128: res3 at large batch"),
    Tile(128, 128, 32, 4, 4, "64×64 warp tiles in 48 KiB, so that two programs share an SM: the work horse from 8.0 to 8.9"),
    Tile(128, 128, 64, 8, 3, "half the loop turns and barriers of the former, two warp groups: the work horse on 9.0 and 10.0"),
    Tile(128, 64, 32, 4, 4, "K of 64: res2, where a wider tile would compute padding"),
    Tile(64, 128, 32, 4, 4, "fewer pixels than 128 tiles can fill an SM with: res4 at batch 1 to 8"),
    Tile(64, 64, 64, 4, 4, "14×14 and 7×7 at small batch, with deep prefetch for long reductions"),
    Tile(32, 64, 64, 4, 4, "7×7 at batch 1: 49 pixels fill two tiles of 32"),
    Tile(32, 32, 64, 4, 4, "the most programs: the smallest problems, split over the reduction"),
    Tile(128, 16, 32, 4, 4, "grouped and depthwise convolutions with at most 16 channels in a group"),
)

# float32 by TF32 tensor cores: the same tiles in bytes.
TF32 = (
    Tile(128, 128, 32, 8, 3, "large problems; 16 more accumulators a thread would spill"),
    Tile(128, 64, 32, 4, 3, "K of 64: res2"),
    Tile(64, 64, 32, 4, 4, "small batch"),
    Tile(32, 32, 32, 4, 4, "the smallest problems"),
    Tile(128, 16, 32, 4, 3, "grouped and depthwise convolutions with at most 16 channels in a group"),
)

# Without tensor cores: IEEE float32 everywhere, and all types on compute capability 7.5, where Triton has no mma.
FMA = (
    Tile(64, 64, 16, 8, 2, "16 accumulators a thread, the largest that doesn't spill on 7.5", since=75),
    Tile(64, 32, 16, 4, 2, "half as wide: K of 32 and small batch", since=75),
    Tile(32, 32, 16, 4, 2, "the smallest problems", since=75),
    Tile(64, 16, 16, 4, 2, "grouped and depthwise convolutions with at most 16 channels in a group", since=75),
)


@dataclass(frozen=True)
class Plan:
    """A tile applied to a problem.

    Attributes:
        tile: the entry of the table.
        walk: POINTWISE, TAPS or ROWS.
        block_k: the tile's k, or a whole filter row for ROWS.
        splits: into how many parts the reduction is split.
    """

    tile: Tile
    walk: int
    block_k: int
    splits: int = 1

    @property
    def name(self) -> str:
        """As the tuning cache spells it: block sizes, warps, stages and splits."""
        t = self.tile
        return f"{t.m}x{t.n}x{t.k}-w{t.warps}-s{t.stages}-k{self.splits}"

    def steps(self, conv: Conv) -> int:
        """Turns of the main loop, over all splits."""
        r, s = conv.kernel
        return r if self.walk == ROWS else r * s * math.ceil(conv.in_channels // conv.groups / self.block_k)


def walk_of(conv: Conv) -> int:
    """The walk that wastes the fewest lanes on padding."""
    if conv.pointwise:
        return POINTWISE
    channels, taps = conv.in_channels // conv.groups, conv.kernel[1]
    lanes = row_lanes(conv)
    by_taps = taps * math.ceil(channels / _SMALLEST_BLOCK_K) * _SMALLEST_BLOCK_K
    return ROWS if lanes < by_taps and lanes <= _MOST_LANES_OF_A_ROW else TAPS


def row_lanes(conv: Conv) -> int:
    """Lanes of one step of the ROWS walk: a power of two, and at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (conv.kernel[1] * (conv.in_channels // conv.groups) - 1).bit_length())


def table(dtype: torch.dtype, chip: Chip, tf32: bool) -> tuple[Tile, ...]:
    """The part of the table for a type: float32 goes to TF32 tensor cores if `tf32`."""
    if not chip.tensor_cores or (dtype == torch.float32 and not tf32):
        return FMA
    return TF32 if dtype == torch.float32 else HALF


def plans(problem: Problem, chip: Chip, tf32: bool) -> list[Plan]:
    """Every plan of the table that fits chip and problem, the most promising first."""
    (conv,) = problem.convs
    walk, itemsize = walk_of(conv), problem.dtype.itemsize
    found = []
    for tile in table(problem.dtype, chip, tf32):
        block_k = row_lanes(conv) if walk == ROWS else tile.k
        bytes_used = tile.shared_bytes(chip, itemsize) * block_k // tile.k
        if bytes_used > chip.shared_limit or (chip.vendor == "cuda" and chip.capability < tile.since):
            continue
        if problem.op == "conv2d_bn_add_relu" and not tile.residual:
            continue
        base = Plan(tile, walk, block_k)
        found += [Plan(tile, walk, block_k, splits) for splits in _splits(base.steps(conv), math.prod(problem.output_shape()))]
    best = {}
    for plan in sorted(found, key=lambda plan: _cost(plan, problem, chip)):
        best.setdefault(plan.tile, plan)
    return list(best.values())


def _splits(steps: int, results: int) -> Iterator[int]:
    splits = 1
    # The partial sums are addressed by 32 bits.
    most = min(_MOST_SPLITS, (2**31 - 1) // max(results, 1))
    while splits == 1 or (splits <= most and steps // splits >= _FEWEST_STEPS_OF_A_SPLIT):
        yield splits
        splits *= 2


def _cost(plan: Plan, problem: Problem, chip: Chip) -> float:
    """Modelled time in units of one multiply-add per SM.

    A step costs its multiply-adds or the reading of its operands; a reading of one element is taken as 64 multiply-adds, between
    the 85 of an A100 and the 50 of an RTX 4090 (flop per second over bytes per second from L2). The rest is whole waves of programs.
    """
    (conv,) = problem.convs
    tile, (n, _, oh, ow) = plan.tile, problem.output_shape()
    pixels, channels = n * oh * ow, conv.out_channels // conv.groups
    programs = math.ceil(pixels / tile.m) * math.ceil(channels / tile.n) * conv.groups * plan.splits
    steps = math.ceil(plan.steps(conv) / plan.splits)
    step = plan.block_k * max(tile.m * tile.n, 64 * (tile.m + tile.n))
    # Filling the pipeline, and the epilogue: reading the residual and writing the result, or the partial sums of a split.
    once = tile.stages * step + 64 * tile.m * tile.n * (4 if plan.splits > 1 else 2)
    work = math.ceil(programs / chip.multiprocessors) * (steps * step + once)
    again = 64 * pixels * conv.out_channels * (plan.splits + 1) / chip.multiprocessors + 2e6 if plan.splits > 1 else 0.0
    return work + again
