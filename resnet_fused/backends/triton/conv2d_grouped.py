"""Convolutions in groups of 4 to 64 channels: several groups as one block of a matrix unit's size.

A unit multiplies 16 by 16 channels at least, where a group of ResNeXt's 32×4d has 4 by 4. Groups that are neighbours are
therefore merged into bundles of up to 16, 32 or 64 channels, whose weights are packed as one block with zeros outside of the
groups. That multiplies as often as there are groups in a bundle, and uses one product of each of them; it reads the
input once for all groups of a bundle, in units of whole sectors. Groups too large to be merged are bundles of one. A step of
the reduction is a filter tap, or a row of the filter where a bundle has 16 channels.

A zero weight makes a NaN of an infinity, and hands on a NaN. Sums with a NaN among them are therefore made again, group by
group, with zeros in the place of the other groups' pixels. It costs as many walks as there are groups in the bundle, and
happens only in tiles that have a NaN.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton import configs
from resnet_fused.backends.triton.configs import Chip
from resnet_fused.backends.triton.conv2d import operand, settled
from resnet_fused.backends.triton.epilogue import epilogue_constants, finish
from resnet_fused.backends.triton.launch import Launch

_MOST_CHANNELS = 64
# Channels of a bundle of several groups. With 64 it would multiply more often than the reading takes, and spill.
_WIDTHS = (16, 32)
_MOST_LANES_OF_A_ROW = 64
_HOPELESS = 3.0


@triton.jit
def window_sums(
    x_rows,
    w_block,
    h0,
    w0,
    H,
    W,
    lane,
    group,  # of the bundle, the only one that counts; with ALL any
    ALL: tl.constexpr,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    REGISTERS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of a tile."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Position of a lane in a step by rows; in a step by taps all are at 0.
    column = lane // C if BY_ROWS else lane * 0
    x_lanes = x_rows + (column * (DILATION_W * CHANNELS - C))[None, :]
    for step in tl.range(0, R if BY_ROWS else R * S, num_stages=STAGES):
        r = step if BY_ROWS else step // S
        s = 0 if BY_ROWS else step % S
        h = h0 + r * DILATION_H
        # As unsigned numbers negative positions are large: one comparison checks both ends.
        inside = (h.to(tl.uint32, bitcast=True) < H)[:, None]
        if BY_ROWS:
            w_pos = w0[:, None] + (column * DILATION_W)[None, :]
            inside = inside & (w_pos.to(tl.uint32, bitcast=True) < W) & (column < S)[None, :]
        else:
            inside = inside & ((w0 + s * DILATION_W).to(tl.uint32, bitcast=True) < W)[:, None]
            if C % BLOCK_K != 0:
                inside = inside & (lane < C)[None, :]
        x = tl.load(x_lanes + (r * DILATION_H * W + s * DILATION_W) * CHANNELS, mask=inside, other=0.0)
        if not ALL:
            x = tl.where(((lane % C) // GROUP_C == group)[None, :], x, 0.0)
        w = tl.load(w_block + step * (BLOCK_N * BLOCK_K))
        acc = settled(tl.dot(operand(x, PRECISION), w, acc, input_precision=PRECISION), REGISTERS)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW"])
def conv2d_grouped_fwd_kernel(
    x_ptr,  # (N, H, W, BUNDLES * C)
    w_ptr,  # (BUNDLES, steps, BLOCK_N, BLOCK_K), see `pack`
    bias_ptr,  # (BUNDLES * K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, OW, BUNDLES * K)
    N,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,  # channels of a bundle
    K: tl.constexpr,
    BUNDLES: tl.constexpr,
    MERGED: tl.constexpr,  # groups of a bundle
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BY_ROWS: tl.constexpr,  # whether a step is a row of the filter; else it is a tap
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,  # whether the unit runs on while the threads do
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHANNELS: tl.constexpr = BUNDLES * C
    GROUP_C: tl.constexpr = C // MERGED
    GROUP_K: tl.constexpr = K // MERGED
    REGISTERS: tl.constexpr = WGMMA and PRECISION == "tf32"
    # Bundles first, so that programs that run at the same time read neighbouring sectors of the same pixels.
    bundle = tl.program_id(0) % BUNDLES
    tile = tl.program_id(0) // BUNDLES
    if WIDE:
        N = N.to(tl.int64)
        tile = tile.to(tl.int64)
    M = N * OH * OW
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)

    # Rows after the last one read the last one again; they are not stored.
    row = tl.minimum(m, M - 1)
    image = row // (OH * OW)
    pixel = row % (OH * OW)
    h0 = (pixel // OW) * STRIDE_H - PAD_H
    w0 = (pixel % OW) * STRIDE_W - PAD_W
    x_rows = x_ptr + (((image * H + h0) * W + w0) * CHANNELS + bundle * C)[:, None] + lane[None, :]
    h0 = h0.to(tl.int32)
    w0 = w0.to(tl.int32)
    STEPS: tl.constexpr = R if BY_ROWS else R * S
    w_block = w_ptr + bundle * (STEPS * BLOCK_N * BLOCK_K) + (k * BLOCK_K)[None, :] + lane[:, None]

    acc = window_sums(
        x_rows, w_block, h0, w0, H, W, lane, 0, True, C, GROUP_C, CHANNELS, R, S, DILATION_H, DILATION_W, BY_ROWS,
        PRECISION, REGISTERS, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if MERGED > 1:  # noqa: SIM102 — at compile time, and the other one at run time
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            for group in range(MERGED):
                own = window_sums(
                    x_rows, w_block, h0, w0, H, W, lane, group, False, C, GROUP_C, CHANNELS, R, S, DILATION_H, DILATION_W,
                    BY_ROWS, PRECISION, WGMMA, 1, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = tl.where((k // GROUP_K == group)[None, :], own, acc)
    finish(acc, bias_ptr, residual_ptr, y_ptr, m, M, k, bundle * K, K, BUNDLES * K, ACTIVATION, SLOPE)


@dataclass(frozen=True)
class Tile:
    """A tile applied to a problem.

    Attributes:
        m: output pixels of a tile.
        merged: groups of a bundle.
        n: lanes for output channels of a bundle, a power of two.
        k: lanes of a step of the reduction, a power of two.
        by_rows: whether a step is a row of the filter; else it is a tap.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    m: int
    merged: int
    n: int
    k: int
    by_rows: bool
    warps: int = 4
    stages: int = 3

    def shared_bytes(self, chip: Chip, itemsize: int) -> int:
        """Shared memory of the pipeline, in bytes."""
        buffers = self.stages if chip.unit in ("wgmma", "tcgen05") else self.stages - 1
        return buffers * (self.m + self.n) * self.k * itemsize

    @property
    def name(self) -> str:
        return f"grouped-{self.m}x{self.n}x{self.k}-w{self.warps}-s{self.stages}"


def why_not(problem: Problem, chip: Chip, tf32: bool) -> str | None:
    """Why the kernel can't serve a convolution that the backend serves; None if it can."""
    conv = problem.conv
    c, k = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    if conv.groups == 1:
        return "it has one group"
    if c % 4 != 0 or max(c, k) > _MOST_CHANNELS:
        return f"its groups have {c} channels and {k} results; the kernel takes 4, 8, 12 … {_MOST_CHANNELS} and at most as many"
    if chip.unit == "fma" or (problem.types.source == torch.float32 and not tf32 and chip.unit != "mfma"):
        return f"the kernel needs a matrix unit, and the device has none for {problem.types.source} as it may be multiplied now"
    return None


def plans(problem: Problem, chip: Chip) -> list[Tile]:
    """The tiles that are worth a measurement: by the model no more than three times slower than the best, which is first."""
    conv = problem.conv
    c, k = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    found = []
    # As many groups as fit each width and divide all of them.
    for merged in {max(p for p in range(1, max(1, w // max(c, k)) + 1) if conv.groups % p == 0) for w in _WIDTHS}:
        by_rows = conv.kernel[1] > 1 and conv.kernel[1] * merged * c <= _MOST_LANES_OF_A_ROW
        lanes = merged * c * (conv.kernel[1] if by_rows else 1)
        block_n, block_k = (max(16, triton.next_power_of_2(width)) for width in (merged * k, lanes))
        # Offsets of 64 bits take two registers each, which 64 sums a thread leave too few of.
        sizes = (64,) if configs.wide(problem) and block_n > 32 else (128, 64)
        found += [Tile(m, merged, block_n, block_k, by_rows) for m in sizes]
    found = [tile for tile in found if tile.shared_bytes(chip, problem.types.source.itemsize) <= chip.shared_limit]
    found.sort(key=lambda tile: _cost(tile, problem, chip))
    return [tile for tile in found if _cost(tile, problem, chip) <= _HOPELESS * _cost(found[0], problem, chip)]


def _cost(tile: Tile, problem: Problem, chip: Chip) -> float:
    """Modelled time in units of one multiply-add per SM, as `configs` models it: of products that aren't used, too."""
    conv, (n, _, oh, ow) = problem.conv, problem.output_shape()
    programs = math.ceil(n * oh * ow / tile.m) * (conv.groups // tile.merged)
    step = tile.k * max(tile.m * tile.n, 64 * (tile.m + tile.n))
    once = tile.stages * step + 128 * tile.m * tile.n
    steps = conv.kernel[0] * (1 if tile.by_rows else conv.kernel[1])
    return math.ceil(programs / chip.multiprocessors) * (steps * step + once)


def pack(weight: Tensor, conv: Conv, tile: Tile) -> Tensor:
    """The weight (K, C / groups, R, S) as (bundles, steps, n, k): a block for each bundle and step, zeros outside of groups."""
    _, c, r, s = weight.shape
    bundles, k = conv.groups // tile.merged, conv.out_channels // conv.groups
    taps = weight.detach().reshape(bundles, tile.merged, k, c, r * s).permute(1, 0, 4, 2, 3)
    blocks = weight.new_zeros(bundles, r * s, tile.n, tile.merged * c)
    for group in range(tile.merged):
        blocks[:, :, group * k : (group + 1) * k, group * c : (group + 1) * c] = taps[group]
    if tile.by_rows:
        blocks = blocks.unflatten(1, (r, s)).transpose(2, 3).flatten(3)
    return torch.nn.functional.pad(blocks, (0, tile.k - blocks.shape[-1])).contiguous()


def launch(problem: Problem, tile: Tile, chip: Chip, tf32: bool) -> Launch:
    """The launch of (x, w, bias, residual or None, y), all channels_last and aligned."""
    conv, dtype = problem.conv, problem.types.source
    n, c, h, w = problem.shape
    _, k, oh, ow = problem.output_shape()
    bundles = conv.groups // tile.merged
    constants = {
        "C": c // bundles,
        "K": k // bundles,
        "BUNDLES": bundles,
        "MERGED": tile.merged,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        **dict(zip(("STRIDE_H", "STRIDE_W"), conv.stride, strict=True)),
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        **dict(zip(("DILATION_H", "DILATION_W"), conv.dilation, strict=True)),
        "BY_ROWS": tile.by_rows,
        **epilogue_constants(problem.epilogue),
        "WIDE": configs.wide(problem),
        "PRECISION": chip.precision(tf32),
        "WGMMA": chip.unit == "wgmma",
        "STAGES": tile.stages,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
    }
    return Launch(
        conv2d_grouped_fwd_kernel,
        (dtype, dtype, dtype, dtype if problem.epilogue.residual else None, dtype),
        (n, h, w, oh, ow),
        constants,
        (math.ceil(n * oh * ow / tile.m) * bundles, 1, 1),
        tile.warps,
        tile.stages,
    )
