"""Convolution, with what follows it, as an implicit matrix product.

    y[m, k] = activation(Σ_j x_window[m, j] · w[k, j] + bias[k] + residual[m, k])

m counts output pixels (n, oh, ow), j counts the filter's (r, s, c), k the output channels of one group. The matrix
x_window is never formed: a program reads its rows where they lie in the channels_last input. Sums are float32, the
epilogue works on the accumulators. Three ways to walk over j, chosen when the kernel is compiled:

* `POINTWISE`: a 1×1 filter without padding. Rows of x_window are rows of x, so nothing is masked but a ragged channel
  count.
* `TAPS`: one step is BLOCK_K channels of one filter tap. Taps and channel blocks are one flat loop, so that the
  software pipeline runs on over the end of a tap; the tap's position is counted up, never divided out.
* `ROWS`: one step is a whole filter row, S·C elements, for few channels (the stem, grouped convolutions): with three
  channels a tap would fill 3 of 32 lanes of a step, and a row of seven taps fills 21. Two pixels at a time, where that
  aligns their windows, are in conv2d_pairs.py.

Weights come packed for the walk by `pack`, padded with zeros to whole steps, so that they are read without a mask.

Neighbouring groups with few channels are merged to one: their weights stand along the diagonal of a matrix of zeros. A tile
then reads whole sectors of x, and the products with zeros are cheaper than empty lanes. But 0 times a NaN or an infinity is
NaN, which so comes into all sums of its pixel. A program that finds a NaN among its sums computes them again, without these
products.

Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, 2014, section 3.2 (implicit GEMM).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import NO_EPILOGUE, Conv, Problem
from resnet_fused.backends.triton import configs
from resnet_fused.backends.triton.chip import Chip
from resnet_fused.backends.triton.configs import Plan
from resnet_fused.backends.triton.epilogue import epilogue_constants, finish
from resnet_fused.backends.triton.launch import Launch
from resnet_fused.backends.triton.window_sums import sums_by_group, tile_of, window_sums

ROWS = tl.constexpr(configs.ROWS)
POINTWISE = tl.constexpr(configs.POINTWISE)


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "steps_per_split"])
def conv2d_fwd_kernel(
    x_ptr,  # (N, H, W, IN)
    w_ptr,  # (GROUPS * K, STEPS * BLOCK_K), see `pack`
    bias_ptr,  # (OUT,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, OW, OUT); with SPLIT the partial sums, (splits, N, OH, OW, OUT) of float32
    N,
    H,
    W,
    OH,
    OW,
    steps_per_split,
    IN: tl.constexpr,  # channels of all groups
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,  # after merging
    MERGED: tl.constexpr,  # how many groups were merged to one; the last may have fewer
    C: tl.constexpr,  # channels of one merged group
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WALK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PRECISION: tl.constexpr,
    REGISTERS: tl.constexpr,  # whether a wgmma takes x from registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = R if WALK == ROWS else R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    if WIDE:
        N = N.to(tl.int64)
    M = N * OH * OW
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), GROUPS * TILES_N, GROUP_M)
    group = tile_n // TILES_N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)

    # Rows after the last one read the last one again, which needs no mask; they are not stored.
    row = tl.minimum(m, M - 1)
    if WALK == POINTWISE and STRIDE_H == 1 and STRIDE_W == 1:
        x_windows = x_ptr + (row * IN + group * C)
        h0 = row
        w0 = row
    else:
        image = row // (OH * OW)
        pixel = row % (OH * OW)
        h0 = (pixel // OW) * STRIDE_H - PAD_H
        w0 = (pixel % OW) * STRIDE_W - PAD_W
        x_windows = x_ptr + (((image * H + h0) * W + w0) * IN + group * C)
        h0 = h0.to(tl.int32)
        w0 = w0.to(tl.int32)
    k_row = k if K % BLOCK_N == 0 else tl.minimum(k, K - 1)
    if WIDE:
        k_row = k_row.to(tl.int64)
    w_filters = w_ptr + (group * K + k_row) * (STEPS * BLOCK_K)

    first_step = 0
    last_step = STEPS
    if SPLIT:
        first_step = tl.program_id(1) * steps_per_split
        last_step = tl.minimum(first_step + steps_per_split, STEPS)
    acc = window_sums(
        x_windows[:, None] + lane[None, :], w_filters[None, :] + lane[:, None], h0, w0, group * C, H, W,
        first_step, last_step, C, IN, S, DILATION_H, DILATION_W, WALK, PRECISION, REGISTERS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    channel = k < K
    if OUT % K != 0:
        channel = channel & (group * K + k < OUT)
    inside = (m < M)[:, None] & channel[None, :]
    offsets = m[:, None] * OUT + (group * K + k)[None, :]
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * M * OUT + offsets, acc, mask=inside)
    else:
        bias = tl.load(bias_ptr + group * K + k, mask=channel, other=0.0)[None, :]
        again = 0
        if MERGED > 1:
            again = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
        if again == 0:
            finish(acc, bias, residual_ptr, y_ptr, offsets, inside, ACTIVATION, SLOPE)
        else:
            acc = sums_by_group(
                x_windows, w_filters, h0, w0, group * C, k, H, W,
                C, K, MERGED, IN, R, S, DILATION_H, DILATION_W, WALK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            finish(acc, bias, residual_ptr, y_ptr, offsets, inside, ACTIVATION, SLOPE)


@triton.jit(do_not_specialize=["M"])
def conv2d_split_fwd_kernel(
    part_ptr,  # (SPLITS, M, K) of float32, from `conv2d_fwd_kernel` with SPLIT
    bias_ptr,
    residual_ptr,
    y_ptr,  # (M, K)
    M,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums, always in the same order, and finishes as the unsplit kernel does."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (k < K)[None, :]
    offsets = m[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(part_ptr + split * (M * K) + offsets, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    finish(acc, bias, residual_ptr, y_ptr, offsets, inside, ACTIVATION, SLOPE)


def merge(weight: Tensor, conv: Conv, merged: int) -> Tensor:
    """The weight (K, C / groups, R, S) of merged groups, (K', C' / groups', R, S): a diagonal in zeros."""
    if merged == 1:
        return weight
    k, c, r, s = weight.shape
    groups = -(-conv.groups // merged)
    own = weight.new_zeros(groups * merged, k // conv.groups, c, r, s)
    own[: conv.groups] = weight.view(conv.groups, k // conv.groups, c, r, s)
    found = weight.new_zeros(groups, merged, k // conv.groups, merged, c, r, s)
    for i in range(merged):
        found[:, i, :, i] = own.view(groups, merged, *own.shape[1:])[:, i]
    return found.view(groups * merged * (k // conv.groups), merged * c, r, s)


def pack(weight: Tensor, conv: Conv, plan: Plan) -> Tensor:
    """The weight (K, C, R, S) as K rows in R-S-C order, every step of the plan's walk padded with zeros to block_k."""
    weight = merge(weight.detach(), conv, plan.merged)
    k, c, r, s = weight.shape
    steps = weight.permute(0, 2, 3, 1)
    steps = steps.reshape(k, r, s * c) if plan.walk == configs.ROWS else steps.reshape(k, r * s, c)
    padding = -steps.shape[2] % plan.block_k
    return torch.nn.functional.pad(steps, (0, padding)).contiguous()


def launches(problem: Problem, plan: Plan, chip: Chip, tf32: bool) -> tuple[Launch, Launch | None]:
    """The launch of (x, w, bias, residual or None, y), and with splits a second one of (partial, bias, residual or
    None, y).

    With splits the first one's y is the partial sums.
    """
    conv = problem.conv
    n, c, h, w = problem.shape
    _, k, oh, ow = problem.output_shape()
    pixels, tile, groups = n * oh * ow, plan.tile, triton.cdiv(conv.groups, plan.merged)
    group_c, group_k = (plan.merged * channels // conv.groups for channels in (c, k))
    split, dtype = plan.splits > 1, problem.types.source
    residual = dtype if problem.epilogue.residual else None
    precision, steps = chip.precision(tf32), plan.steps(conv)
    steps_per_split = triton.cdiv(steps, plan.splits)
    splits = triton.cdiv(steps, steps_per_split)
    constants = {
        "IN": c,
        "OUT": k,
        "GROUPS": groups,
        "MERGED": plan.merged,
        "C": group_c,
        "K": group_k,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        **dict(zip(("STRIDE_H", "STRIDE_W"), conv.stride, strict=True)),
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        **dict(zip(("DILATION_H", "DILATION_W"), conv.dilation, strict=True)),
        "WALK": plan.walk,
        **epilogue_constants(NO_EPILOGUE if split else problem.epilogue),
        "SPLIT": split,
        "WIDE": configs.wide(problem),
        "PRECISION": precision,
        "REGISTERS": chip.unit == "wgmma" and precision == "tf32",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": 8,
    }
    tiles = triton.cdiv(pixels, tile.m) * triton.cdiv(group_k, tile.n) * groups
    main = Launch(
        conv2d_fwd_kernel,
        (dtype, dtype, dtype, None if split else residual, torch.float32 if split else dtype),
        (n, h, w, oh, ow, steps_per_split),
        constants,
        (tiles, splits, 1),
        tile.warps,
        tile.stages,
    )
    if not split:
        return main, None
    rest = Launch(
        conv2d_split_fwd_kernel,
        (torch.float32, dtype, residual, dtype),
        (pixels,),
        # Four elements a thread: 16 bytes of partial sums, so that neighbours read neighbouring sectors.
        {"K": k, **epilogue_constants(problem.epilogue), "SPLITS": splits, "BLOCK_M": 8, "BLOCK_N": 64},
        (triton.cdiv(pixels, 8), triton.cdiv(k, 64), 1),
    )
    return main, rest


def bind(problem: Problem, plan: Plan, chip: Chip, tf32: bool) -> Callable[..., None]:
    """A function of (x, w, bias, residual, y), all channels_last and aligned, that fills y."""
    main, rest = launches(problem, plan, chip, tf32)
    run = main.bind()
    if rest is None:
        return run
    finish, splits = rest.bind(), main.grid[1]

    def split(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor) -> None:
        partial = y.new_empty((splits, y.numel()), dtype=torch.float32)
        run(x, w, bias, None, partial)
        finish(partial, bias, residual, y)

    return split
