"""Depthwise convolution, one channel a group, with what follows it; no matrix product.

    y[m, c] = activation(Σ_rs x[window of m at (r, s), c] · w[r, s, c] + bias[c] + residual[m, c])

A program computes a tile of output pixels and BLOCK_C channels, which are the lanes: neighbours read 16 bytes each, whole
sectors in all. A thread computes COLUMNS pixels side by side and reads each element of a row of their windows once, for all of
them. Rows are read again for the pixels below, from L1. The multiply-adds are float32, whatever torch.backends says of TF32.

x is read with a mask, zeros for the halo, as stock PyTorch pads it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton.chip import Chip
from resnet_fused.backends.triton.configs import wide
from resnet_fused.backends.triton.depthwise_configs import COLUMNS, DepthwisePlan
from resnet_fused.backends.triton.epilogue import epilogue_constants, finish
from resnet_fused.backends.triton.launch import Launch

COLUMNS_OF_A_THREAD = tl.constexpr(COLUMNS)


@triton.jit
def add_tap(acc, x, w_row, there, channels, s: tl.constexpr, S: tl.constexpr):
    """acc + x · w for tap s of a filter row; acc where the row has no such tap."""
    if s >= 0 and s < S:
        acc += x * tl.load(w_row + s * channels, mask=there, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "units"])
def conv2d_depthwise_fwd_kernel(
    x_ptr,  # (N, H, W, units * UNIT)
    w_ptr,  # (R, S, units * UNIT)
    bias_ptr,  # (units * UNIT,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, OW, units * UNIT)
    N,
    H,
    W,
    OH,
    OW,
    units,
    UNIT: tl.constexpr,  # channels that there are or aren't together, so that they are one access
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    TILE_H: tl.constexpr,  # rows of pixels of a tile
    TILE_W: tl.constexpr,  # threads along a row of it
    BLOCK_C: tl.constexpr,
):
    channels = units * UNIT
    tiles_c = tl.cdiv(units, BLOCK_C // UNIT)
    tiles_w = tl.cdiv(OW, TILE_W * COLUMNS_OF_A_THREAD)
    tiles_h = tl.cdiv(OH, TILE_H)
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_w = pid // tiles_c % tiles_w
    tile_h = pid // (tiles_c * tiles_w) % tiles_h
    image = pid // (tiles_c * tiles_w * tiles_h)
    if WIDE:
        image = image.to(tl.int64)

    lane = tl.arange(0, BLOCK_C)
    c = tile_c * BLOCK_C + lane
    # What is by channel has a copy for each pixel, so that threads hold it as they hold x.
    there = tl.broadcast_to((tile_c * (BLOCK_C // UNIT) + lane // UNIT < units)[None, :], (TILE_H * TILE_W, BLOCK_C))
    by_channel = tl.broadcast_to(c[None, :], (TILE_H * TILE_W, BLOCK_C))
    place = tl.arange(0, TILE_H * TILE_W)
    oh = tile_h * TILE_H + place // TILE_W
    ow = (tile_w * TILE_W + place % TILE_W) * COLUMNS_OF_A_THREAD
    h0 = oh * STRIDE - PAD_H
    w0 = ow * STRIDE - PAD_W
    x_windows = x_ptr + ((image * H + h0) * W + w0)[:, None] * channels + c[None, :]

    acc0 = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    acc1 = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    acc2 = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    acc3 = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for r in tl.static_range(R):
        # As unsigned numbers negative positions are large: one comparison checks both ends.
        row_there = (h0 + r).to(tl.uint32, bitcast=True) < H
        w_row = w_ptr + r * S * channels + by_channel
        for j in tl.static_range((COLUMNS_OF_A_THREAD - 1) * STRIDE + S):
            inside = row_there & ((w0 + j).to(tl.uint32, bitcast=True) < W)
            x = tl.load(x_windows + (r * W + j) * channels, mask=inside[:, None] & there, other=0.0).to(tl.float32)
            acc0 = add_tap(acc0, x, w_row, there, channels, j, S)
            acc1 = add_tap(acc1, x, w_row, there, channels, j - STRIDE, S)
            acc2 = add_tap(acc2, x, w_row, there, channels, j - 2 * STRIDE, S)
            acc3 = add_tap(acc3, x, w_row, there, channels, j - 3 * STRIDE, S)

    bias = tl.load(bias_ptr + by_channel, mask=there, other=0.0)
    offsets = ((image * OH + oh) * OW + ow)[:, None] * channels + c[None, :]
    for i in tl.static_range(COLUMNS_OF_A_THREAD):
        acc = acc0 if i == 0 else acc1 if i == 1 else acc2 if i == 2 else acc3
        inside = ((oh < OH) & (ow + i < OW))[:, None] & there
        finish(acc, bias, residual_ptr, y_ptr, offsets + i * channels, inside, ACTIVATION, SLOPE)


def pack(weight: Tensor, conv: Conv, plan: DepthwisePlan) -> Tensor:
    """The weight (C, 1, R, S) as (R, S, C)."""
    return weight.detach().squeeze(1).permute(1, 2, 0).contiguous()


def launches(problem: Problem, plan: DepthwisePlan, chip: Chip, tf32: bool) -> tuple[Launch, None]:
    """The launch of (x, w, bias, residual or None, y), and no second one."""
    conv = problem.conv
    n, c, h, w = problem.shape
    _, _, oh, ow = problem.output_shape()
    dtype = problem.types.source
    unit = math.gcd(c, 16 // dtype.itemsize)
    constants = {
        "UNIT": unit,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        "STRIDE": conv.stride[0],
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        **epilogue_constants(problem.epilogue),
        "WIDE": wide(problem),
        "TILE_H": plan.tile.rows,
        "TILE_W": plan.tile.threads,
        "BLOCK_C": plan.channels,
    }
    main = Launch(
        conv2d_depthwise_fwd_kernel,
        (dtype, dtype, dtype, dtype if problem.epilogue.residual else None, dtype),
        (n, h, w, oh, ow, c // unit),
        constants,
        (plan.programs(problem), 1, 1),
        plan.tile.warps,
    )
    return main, None


def bind(problem: Problem, plan: DepthwisePlan, chip: Chip, tf32: bool) -> Callable[..., None]:
    """A function of (x, w, bias, residual, y), all channels_last and aligned, that fills y."""
    return launches(problem, plan, chip, tf32)[0].bind()
