"""Batch norm in training: statistics, apply, and the two passes of the gradient, with residual and ReLU.

An activation is a matrix of rows (pixels of the batch) and channels, in memory either row by row (channels_last) or image by
image and channel by channel (contiguous). The reductions write a partial result per program, which a small kernel combines,
in an order that doesn't change: results are the same from run to run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from resnet_fused.backends.triton.elementwise import relu
from resnet_fused.backends.triton.launch import Launch

_WARPS = 4


@triton.jit
def tile_offsets(first_row, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows, channels and offsets of a tile. PIXELS: of an image, where memory goes by image and channel; 0: row by row."""
    row = first_row + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PIXELS == 0:
        offsets = first_row * tl.full((), C, tl.int64) + (tl.arange(0, BLOCK_R)[:, None] * C + channel[None, :])
    else:
        image = (row // PIXELS).to(tl.int64)
        offsets = (image * C * PIXELS + row % PIXELS)[:, None] + channel[None, :] * PIXELS
    return row, channel, offsets


@triton.jit
def through_relu(dy, y):
    """dy where y is positive or NaN, else 0, as stock PyTorch."""
    return tl.where(y <= 0.0, 0.0, dy)


@triton.jit
def merge(count, mean, deviations, more, its_mean, its_deviations):
    """Mean and sum of squared deviations of two sets of values together: Chan's formula."""
    total = tl.maximum(count + more, 1.0)
    away = its_mean - mean
    deviations = deviations + its_deviations + away * away * (count * more / total)
    return count + more, mean + away * (more / total), deviations


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def bn_statistics_fwd_kernel(
    x_ptr,
    partial_ptr,  # (programs, 2, C) of float32: mean, sum of squared deviations
    rows,
    rows_per_program,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of rows_per_program rows, tile by tile: two sweeps over registers each, merged by Chan's formula."""
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    deviations = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row, channel, offsets = tile_offsets(first, C, PIXELS, BLOCK_R, BLOCK_C)
        inside = (row < end)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        more = tl.minimum(end - first, BLOCK_R).to(tl.float32)
        # Around the tile's first row, so that sums of large values lose no digits.
        origin = tl.sum(tl.where(tl.arange(0, BLOCK_R)[:, None] == 0, x, 0.0), 0)
        x = tl.where(inside, x - origin[None, :], 0.0)
        center = tl.sum(x, 0) / more
        away = tl.where(inside, x - center[None, :], 0.0)
        count, mean, deviations = merge(count, mean, deviations, more, origin + center, tl.sum(away * away, 0))
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = partial_ptr + tl.program_id(0) * 2 * C + channel
    tl.store(out, mean, mask=channel < C)
    tl.store(out + C, deviations, mask=channel < C)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def bn_statistics_combine_fwd_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    rows,
    rows_per_program,
    C: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance from the partial results of PROGRAMS programs."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    deviations = tl.zeros((BLOCK_C,), tl.float32)
    for program in range(PROGRAMS):
        own = partial_ptr + program * 2 * C + channel
        its_mean = tl.load(own, mask=channel < C, other=0.0)
        its_deviations = tl.load(own + C, mask=channel < C, other=0.0)
        more = tl.minimum(rows - program * rows_per_program, rows_per_program).to(tl.float32)
        count, mean, deviations = merge(count, mean, deviations, more, its_mean, its_deviations)
    tl.store(mean_ptr + channel, mean, mask=channel < C)
    tl.store(var_ptr + channel, deviations / count, mask=channel < C)


@triton.jit(do_not_specialize=["rows"])
def bn_fwd_kernel(
    x_ptr,
    residual_ptr,  # as x, or None
    mean_ptr,
    var_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    y_ptr,
    rows,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = act((x − mean) · weight / sqrt(var + eps) + bias + residual)."""
    row, channel, offsets = tile_offsets(tl.program_id(0) * BLOCK_R, C, PIXELS, BLOCK_R, BLOCK_C)
    present = channel < C
    inside = (row < rows)[:, None] & present[None, :]
    mean = tl.load(mean_ptr + channel, mask=present, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=present, other=1.0) + EPS)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=present, other=0.0)
    y = (tl.load(x_ptr + offsets, mask=inside).to(tl.float32) - mean[None, :]) * scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=present, other=0.0)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside).to(tl.float32)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def bn_reduce_bwd_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,  # or None: no ReLU
    mean_ptr,
    masked_ptr,  # or None: not wanted
    partial_ptr,  # (programs, 2, C) of float32: sums of g and of g (x − mean)
    rows,
    rows_per_program,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the gradient through ReLU's mask over rows_per_program rows; the gradient itself goes to masked_ptr."""
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    products = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row, channel, offsets = tile_offsets(first, C, PIXELS, BLOCK_R, BLOCK_C)
        inside = (row < end)[:, None] & (channel < C)[None, :]
        g = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            g = through_relu(g, tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
        if masked_ptr is not None:
            tl.store(masked_ptr + offsets, g.to(masked_ptr.dtype.element_ty), mask=inside)
        away = tl.where(inside, tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :], 0.0)
        sums += tl.sum(g, 0)
        products += tl.sum(g * away, 0)
    out = partial_ptr + tl.program_id(0) * 2 * C + channel
    tl.store(out, sums, mask=channel < C)
    tl.store(out + C, products, mask=channel < C)


@triton.jit
def bn_reduce_combine_bwd_kernel(
    partial_ptr,
    var_ptr,
    dweight_ptr,
    dbias_ptr,
    C: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
):
    """dweight and dbias from the partial results of PROGRAMS programs."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    products = tl.zeros((BLOCK_C,), tl.float32)
    for program in range(PROGRAMS):
        own = partial_ptr + program * 2 * C + channel
        sums += tl.load(own, mask=channel < C, other=0.0)
        products += tl.load(own + C, mask=channel < C, other=0.0)
    var = tl.load(var_ptr + channel, mask=channel < C, other=1.0)
    tl.store(dbias_ptr + channel, sums, mask=channel < C)
    tl.store(dweight_ptr + channel, products / tl.sqrt(var + EPS), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "count"])
def bn_bwd_kernel(
    dy_ptr,
    x_ptr,  # or None, as dweight_ptr and dbias_ptr: statistics are constants
    y_ptr,  # or None: no ReLU
    mean_ptr,
    var_ptr,
    weight_ptr,  # or None
    dweight_ptr,
    dbias_ptr,
    masked_ptr,  # or None: not wanted
    dx_ptr,
    rows,
    count,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
):
    """dx = weight / sqrt(var + eps) · (g − dbias / count − xhat · dweight / count), g = dy through ReLU's mask."""
    row, channel, offsets = tile_offsets(tl.program_id(0) * BLOCK_R, C, PIXELS, BLOCK_R, BLOCK_C)
    present = channel < C
    inside = (row < rows)[:, None] & present[None, :]
    inverse = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=present, other=1.0) + EPS)
    scale = inverse
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=present, other=0.0)
    g = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        g = through_relu(g, tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
    if masked_ptr is not None:
        tl.store(masked_ptr + offsets, g.to(masked_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        values = count.to(tl.float32)
        slope = tl.load(dweight_ptr + channel, mask=present, other=0.0) / values * inverse
        away = tl.load(x_ptr + offsets, mask=inside).to(tl.float32) - tl.load(mean_ptr + channel, mask=present)[None, :]
        g = g - (tl.load(dbias_ptr + channel, mask=present, other=0.0) / values)[None, :] - away * slope[None, :]
    tl.store(dx_ptr + offsets, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """How an activation is cut into tiles, and into programs for the reductions."""

    rows: int
    channels: int
    pixels: int  # of an image; 0 in channels_last
    block_r: int
    block_c: int
    programs: int

    @property
    def tile(self) -> dict[str, Any]:
        return {"C": self.channels, "PIXELS": self.pixels, "BLOCK_R": self.block_r, "BLOCK_C": self.block_c}

    @property
    def rows_per_program(self) -> int:
        return triton.cdiv(triton.cdiv(self.rows, self.programs), self.block_r) * self.block_r

    @property
    def grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.rows, self.block_r), triton.cdiv(self.channels, self.block_c), 1

    @property
    def reduction_grid(self) -> tuple[int, int, int]:
        return self.programs, self.grid[1], 1

    @property
    def combine_grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.channels, 64), 1, 1


def plan(n: int, c: int, h: int, w: int, dtype: torch.dtype, channels_last: bool) -> Plan:
    """Tiles of which every thread has 32 bytes, and enough programs for the reductions to fill a GPU."""
    rows, elements = n * h * w, 32 * _WARPS * 32 // dtype.itemsize
    if channels_last or h * w == 1:
        block_c = min(triton.next_power_of_2(c), 128)
        pixels = 0
    else:
        block_c = 1
        pixels = h * w
    block_r = max(1, elements // block_c)
    wanted = max(1, 1024 // triton.cdiv(c, block_c))
    rows_per_program = triton.cdiv(triton.cdiv(rows, min(wanted, 256)), block_r) * block_r
    return Plan(rows, c, pixels, block_r, block_c, triton.cdiv(rows, rows_per_program))


_F32 = torch.float32


def statistics(p: Plan, dtype: torch.dtype) -> tuple[Launch, Launch]:
    """Launches of (x, partial) and (partial, mean, var)."""
    scalars = (p.rows, p.rows_per_program)
    combine = {"C": p.channels, "PROGRAMS": p.programs, "BLOCK_C": 64}
    return (
        Launch(bn_statistics_fwd_kernel, (dtype, _F32), scalars, p.tile, p.reduction_grid, _WARPS),
        Launch(bn_statistics_combine_fwd_kernel, (_F32,) * 3, scalars, combine, p.combine_grid, 2),
    )


def apply(p: Plan, dtype: torch.dtype, residual: bool, weight: bool, bias: bool, eps: float, relu: bool) -> Launch:
    """Launch of (x, residual, mean, var, weight, bias, y)."""
    tensors = (dtype, dtype if residual else None, _F32, _F32, _F32 if weight else None, _F32 if bias else None, dtype)
    return Launch(bn_fwd_kernel, tensors, (p.rows,), {**p.tile, "EPS": eps, "RELU": relu}, p.grid, _WARPS)


def backward_reduce(p: Plan, dtype: torch.dtype, relu: bool, masked: bool, eps: float) -> tuple[Launch, Launch]:
    """Launches of (dy, x, y, mean, masked, partial) and (partial, var, dweight, dbias)."""
    tensors = (dtype, dtype, dtype if relu else None, _F32, dtype if masked else None, _F32)
    combine = {"C": p.channels, "PROGRAMS": p.programs, "BLOCK_C": 64, "EPS": eps}
    return (
        Launch(bn_reduce_bwd_kernel, tensors, (p.rows, p.rows_per_program), p.tile, p.reduction_grid, _WARPS),
        Launch(bn_reduce_combine_bwd_kernel, (_F32,) * 4, (), combine, p.combine_grid, 2),
    )


def backward_apply(
    p: Plan, dtype: torch.dtype, batch: bool, relu: bool, weight: bool, masked: bool, eps: float, count: int
) -> Launch:
    """Launch of (dy, x, y, mean, var, weight, dweight, dbias, masked, dx)."""
    sums = _F32 if batch else None
    own = (dtype if batch else None, dtype if relu else None)
    tensors = (dtype, *own, _F32, _F32, _F32 if weight else None, sums, sums, dtype if masked else None, dtype)
    return Launch(bn_bwd_kernel, tensors, (p.rows, count), {**p.tile, "EPS": eps}, p.grid, _WARPS)
