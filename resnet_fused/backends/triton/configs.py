"""Tile configurations of the convolution kernel, each with why it is there, and the choice among them without timing.

Nothing here was timed on a GPU. Registers, spills, instructions and shared memory of every entry were counted, and are
held by tests/ptx/triton; the choice is a model, which `rf.tune` replaces by measurements.
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
# The walk of conv2d_pairs.py, by whole filter rows of two pixels, and how many elements it reads at a time.
PAIRS, UNIT = 3, 4

_SMALLEST_BLOCK_K = 32
_MOST_LANES_OF_A_ROW = 128
_MOST_SPLITS = 16
_HOPELESS = 3.0
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
    def unit(self) -> str:
        """What Triton multiplies matrices with on this chip: "wgmma", "tcgen05", "mma.sync", "mfma"; "fma" on 7.5."""
        if self.vendor == "hip":
            return "mfma"
        if self.capability < 80:
            return "fma"
        return {9: "wgmma", 10: "tcgen05"}.get(self.capability // 10, "mma.sync")

    def precision(self, tf32: bool) -> str:
        """What tl.dot is to multiply float32 in, "ieee" or, if `tf32` allows it and there are such units, "tf32"."""
        return "tf32" if tf32 and self.unit not in ("fma", "mfma") else "ieee"

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Chip:
        """The chip of a device; for the interpreter, which runs one program at a time, an A100 of one SM."""
        if device.type == "cpu":
            return cls("cuda", 80, 1, 163 << 10)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            number = int(properties.gcnArchName.split(":")[0].removeprefix("gfx"), 16)
            return cls("hip", number, properties.multi_processor_count, properties.shared_memory_per_block)
        capability = properties.major * 10 + properties.minor
        shared_limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls("cuda", capability, properties.multi_processor_count, shared_limit)


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
        units: the matrix units (`Chip.unit`) that it is meant for; empty for all.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    why: str
    units: tuple[str, ...] = ()

    def fits_registers(self, chip: Chip, walk: int, residual: bool, wide: bool = False) -> bool:
        """Whether it compiles without spills; `wide` is for offsets of 64 bits, which take two registers each.

        With 128 accumulators a thread, half of the registers, there is no room for such offsets, nor for the masks of a
        filter row, nor for a residual where ptxas keeps what it loads beside all the accumulators: those of a wgmma.
        """
        accumulators = self.m * self.n // (32 * self.warps)
        by_rows = walk in (ROWS, PAIRS)
        if wide:
            return accumulators <= (32 if by_rows else 64)
        if accumulators <= 64:
            return True
        return not by_rows and not (residual and chip.unit == "wgmma")

    def shared_bytes(self, chip: Chip, itemsize: int, walk: int = TAPS) -> int:
        """Shared memory of the main loop's tiles of k elements a row, in bytes."""
        # wgmma and tcgen05 read shared memory; elsewhere the oldest tiles of the pipeline are in registers.
        buffers = self.stages if chip.unit in ("wgmma", "tcgen05") else self.stages - 1
        rows = self.m // 2 + 2 * self.n if walk == PAIRS else self.m + self.n
        return buffers * rows * self.k * itemsize


_SYNC = ("mma.sync", "mfma")

# float16 and bfloat16. Warp tiles of 64×64 (128×128 by 4 warps) need the fewest shared-memory reads per mma.
HALF = (
    Tile(128, 256, 64, 8, 3, "widest tile: 85 flop per byte read; res4 and res5 at large batch"),
    Tile(256, 128, 32, 8, 3, "as wide, for K of 128: res3 at large batch", _SYNC),
    Tile(128, 128, 32, 4, 4, "64×64 warp tiles, 48 KiB: two programs share an SM; the work horse without wgmma", _SYNC),
    Tile(128, 128, 64, 8, 3, "two warp groups and half the loop turns: the work horse on 9.0 and 10.0"),
    Tile(128, 64, 32, 4, 4, "K of 64: res2, where a wider tile would compute padding"),
    Tile(64, 128, 32, 4, 4, "fewer pixels than 128 tiles can fill an SM with: res4 at batch 1 to 8"),
    Tile(64, 64, 64, 4, 4, "14×14 and 7×7 at small batch, with deep prefetch for long reductions"),
    Tile(32, 64, 64, 4, 4, "7×7 at batch 1: 49 pixels fill two tiles of 32"),
    Tile(32, 32, 64, 4, 4, "the most programs: the smallest problems, split over the reduction"),
    Tile(128, 16, 64, 4, 3, "grouped and depthwise convolutions with at most 16 channels in a group"),
)

# float32 by tensor cores: the same tiles in bytes.
TF32 = (
    Tile(128, 128, 32, 8, 3, "large problems; 16 more accumulators a thread would spill"),
    Tile(128, 64, 32, 4, 3, "K of 64: res2"),
    Tile(64, 64, 32, 4, 4, "small batch"),
    Tile(32, 32, 32, 4, 4, "the smallest problems"),
    Tile(128, 16, 32, 4, 3, "grouped and depthwise convolutions with at most 16 channels in a group"),
)

# Without tensor cores: IEEE float32 everywhere, and all types on compute capability 7.5, where Triton has no mma.
FMA = (
    Tile(64, 64, 32, 8, 2, "16 accumulators a thread: operands go through registers too, and more would spill on 7.5"),
    Tile(32, 32, 32, 4, 2, "the smallest problems"),
    Tile(64, 16, 32, 2, 2, "grouped and depthwise convolutions with at most 16 channels in a group"),
)


@dataclass(frozen=True)
class Plan:
    """A tile applied to a problem.

    Attributes:
        tile: the entry of the table.
        walk: POINTWISE, TAPS, ROWS or PAIRS.
        block_k: the tile's k, or for ROWS and PAIRS a whole filter row.
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
        return r if self.walk in (ROWS, PAIRS) else r * s * math.ceil(conv.in_channels // conv.groups / self.block_k)


def walk_of(problem: Problem) -> int:
    """The walk that wastes the fewest lanes on padding."""
    conv = problem.conv
    if conv.pointwise:
        return POINTWISE
    channels, taps = conv.in_channels // conv.groups, conv.kernel[1]
    lanes = row_lanes(conv)
    by_taps = taps * math.ceil(channels / _SMALLEST_BLOCK_K) * _SMALLEST_BLOCK_K
    if lanes >= by_taps or lanes > _MOST_LANES_OF_A_ROW:
        return TAPS
    return PAIRS if _pairs_fit(problem) else ROWS


def row_lanes(conv: Conv) -> int:
    """Lanes of one step by filter rows: a power of two, and at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (conv.kernel[1] * (conv.in_channels // conv.groups) - 1).bit_length())


def lead(conv: Conv) -> int:
    """Elements in front of the windows of two neighbours from which on they start at a multiple of UNIT."""
    return -conv.padding[1] * conv.in_channels % UNIT


def _pairs_fit(problem: Problem) -> bool:
    """Whether windows of two neighbours start at multiples of UNIT where single ones don't, and fit into one step."""
    conv = problem.conv
    (_, c, _, w), s, stride = problem.shape, conv.kernel[1], conv.stride[1]
    aligned = 2 * stride * c % UNIT == 0 and w * c % UNIT == 0 and c % UNIT != 0
    fits = lead(conv) + (stride + s) * c <= row_lanes(conv)
    return conv.groups == 1 and conv.dilation[1] == 1 and aligned and fits and problem.output_shape()[3] % 2 == 0


def table(dtype: torch.dtype, chip: Chip, tf32: bool) -> tuple[Tile, ...]:
    """The part of the table for a type: float32 goes to tensor cores if `tf32`; AMD's multiply IEEE float32 anyway."""
    if chip.unit == "fma" or (dtype == torch.float32 and not tf32 and chip.unit != "mfma"):
        tiles: tuple[Tile, ...] = FMA
    else:
        tiles = TF32 if dtype == torch.float32 else HALF
    return tuple(t for t in tiles if not t.units or chip.unit in t.units)


def wide(problem: Problem) -> bool:
    """Whether a tensor has so many elements that offsets into it need 64 bits."""
    conv = problem.conv
    weights = conv.out_channels * math.ceil(conv.in_channels / _SMALLEST_BLOCK_K) * 64 * math.prod(conv.kernel)
    return max(math.prod(problem.shape), math.prod(problem.output_shape()), weights) >= 2**31


def plans(problem: Problem, chip: Chip, tf32: bool) -> list[Plan]:
    """Every plan of the table that fits chip and problem, the most promising first."""
    conv = problem.conv
    walk, itemsize = walk_of(problem), problem.types.source.itemsize
    by_rows = walk in (ROWS, PAIRS)
    found = []
    for tile in table(problem.types.source, chip, tf32):
        block_k = row_lanes(conv) if by_rows else tile.k
        bytes_used = tile.shared_bytes(chip, itemsize, walk) * block_k // tile.k
        residual = problem.epilogue.residual
        if bytes_used > chip.shared_limit or not tile.fits_registers(chip, walk, residual, wide(problem)):
            continue
        base = Plan(tile, walk, block_k)
        most = 1 if walk == PAIRS else _MOST_SPLITS
        splits = _splits(base.steps(conv), math.prod(problem.output_shape()), most)
        found += [Plan(tile, walk, block_k, number) for number in splits]
    best: dict[Tile, Plan] = {}
    for plan in sorted(found, key=lambda plan: _cost(plan, problem, chip)):
        best.setdefault(plan.tile, plan)
    return list(best.values())


def promising(problem: Problem, chip: Chip, tf32: bool) -> list[Plan]:
    """The plans that are worth a measurement: by the model no more than three times slower than the best."""
    found = plans(problem, chip, tf32)
    limit = _HOPELESS * _cost(found[0], problem, chip)
    return [plan for plan in found if _cost(plan, problem, chip) <= limit]


def _splits(steps: int, results: int, most: int) -> Iterator[int]:
    splits = 1
    # The partial sums are addressed by 32 bits.
    most = min(most, (2**31 - 1) // max(results, 1))
    while splits == 1 or (splits <= most and steps // splits >= _FEWEST_STEPS_OF_A_SPLIT):
        yield splits
        splits *= 2


def _cost(plan: Plan, problem: Problem, chip: Chip) -> float:
    """Modelled time in units of one multiply-add per SM.

    A step costs its multiply-adds or the reading of its operands; a reading of one element is taken as 64
    multiply-adds, between the 85 of an A100 and the 50 of an RTX 4090 (flop per second over bytes per second from L2).
    The rest is whole waves of programs.
    """
    conv = problem.conv
    tile, (n, _, oh, ow) = plan.tile, problem.output_shape()
    pixels, channels = n * oh * ow, conv.out_channels // conv.groups
    programs = math.ceil(pixels / tile.m) * math.ceil(channels / tile.n) * conv.groups * plan.splits
    steps = math.ceil(plan.steps(conv) / plan.splits)
    step = plan.block_k * max(tile.m * tile.n, 64 * (tile.m + tile.n))
    # Filling the pipeline, and the epilogue: reading the residual and writing the result, or the partial sums of a
    # split.
    once = tile.stages * step + 64 * tile.m * tile.n * (4 if plan.splits > 1 else 2)
    work = math.ceil(programs / chip.multiprocessors) * (steps * step + once)
    again = 64 * pixels * conv.out_channels * (plan.splits + 1) / chip.multiprocessors + 2e6 if plan.splits > 1 else 0.0
    return work + again
