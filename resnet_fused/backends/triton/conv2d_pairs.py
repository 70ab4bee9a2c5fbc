"""The convolution of conv2d.py on few channels (the stem), two neighbouring output pixels at a time.

A window's row of the stem has 21 elements, and starts at any multiple of two bytes, so that it can only be read element by
element. The windows of two neighbours together start at multiples of 4 elements, once some elements in front of them are
read along, and are copied in units of as many: 8 bytes of float16, asynchronously. A program has one set of sums for the
left pixels of its pairs and one for the right ones, each with weights of its own, which stand where the pixel's window is.

Elements that are not in a pixel's window are set to 0 and not only multiplied by 0, so that a NaN or Inf among them stays
out of its sum.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton import configs
from resnet_fused.backends.triton.configs import Chip, Plan
from resnet_fused.backends.triton.conv2d import operand, settled, tile_of
from resnet_fused.backends.triton.epilogue import epilogue_constants, finish
from resnet_fused.backends.triton.launch import Launch

UNIT = tl.constexpr(configs.UNIT)


@triton.jit(do_not_specialize=["N", "H", "UNITS", "OH", "PAIRS"])
def conv2d_pairs_fwd_kernel(
    x_ptr,  # (N, H, UNITS * UNIT)
    w_ptr,  # (2, K, R * BLOCK_K), see `pack`
    bias_ptr,  # (K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, 2 * PAIRS, K)
    N,
    H,
    UNITS,
    OH,
    PAIRS,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    LEAD: tl.constexpr,  # elements in front of a pair's windows, which are read along
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PRECISION: tl.constexpr,
    REGISTERS: tl.constexpr,  # whether a wgmma takes x from registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    if WIDE:
        N = N.to(tl.int64)
    M = N * OH * PAIRS
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M // 2), TILES_N, GROUP_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)

    # Pairs after the last one read the last one again, which needs no mask; they are not stored.
    pair = tl.minimum(tile_m * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2), M - 1)
    image = pair // (OH * PAIRS)
    within = (pair % (OH * PAIRS)).to(tl.int32)
    h0 = (within // PAIRS) * STRIDE_H - PAD_H
    first = (within % PAIRS) * (2 * STRIDE_W * C // UNIT) - (PAD_W * C + LEAD) // UNIT
    # As unsigned numbers negative positions are large: one comparison checks both ends.
    across = (first[:, None] + (lane // UNIT)[None, :]).to(tl.uint32, bitcast=True) < UNITS
    x_rows = x_ptr + (((image * H + h0) * UNITS + first) * UNIT)[:, None] + lane[None, :]
    k_row = k if K % BLOCK_N == 0 else tl.minimum(k, K - 1)
    if WIDE:
        k_row = k_row.to(tl.int64)
    w_rows = w_ptr + (k_row * (R * BLOCK_K))[None, :] + lane[:, None]
    left = ((lane >= LEAD) & (lane < LEAD + S * C))[None, :]
    right = ((lane >= LEAD + STRIDE_W * C) & (lane < LEAD + (STRIDE_W + S) * C))[None, :]

    left_acc = tl.zeros((BLOCK_M // 2, BLOCK_N), tl.float32)
    right_acc = tl.zeros((BLOCK_M // 2, BLOCK_N), tl.float32)
    for r in range(R):
        h = h0 + r * DILATION_H
        inside = across & (h.to(tl.uint32, bitcast=True) < H)[:, None]
        x = operand(tl.load(x_rows + r * (DILATION_H * UNIT) * UNITS, mask=inside, other=0.0), PRECISION)
        left_w = tl.load(w_rows + r * BLOCK_K)
        right_w = tl.load(w_rows + (K * R + r) * BLOCK_K)
        left_acc = tl.dot(tl.where(left, x, 0.0), left_w, left_acc, input_precision=PRECISION)
        right_acc = tl.dot(tl.where(right, x, 0.0), right_w, right_acc, input_precision=PRECISION)
        right_acc = settled(right_acc, REGISTERS)

    acc = tl.join(left_acc, right_acc).permute(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    finish(acc, bias_ptr, residual_ptr, y_ptr, m, 2 * M, k, 0, K, K, ACTIVATION, SLOPE)


def pack(weight: Tensor, conv: Conv, plan: Plan) -> Tensor:
    """The weight (K, C, R, S) as (2, K, R, block_k): each filter row where the left and the right pixel's windows are."""
    k, c, r, s = weight.shape
    rows = weight.detach().permute(0, 2, 3, 1).reshape(k, r, s * c)
    packed = weight.new_zeros(2, k, r, plan.block_k)
    for side in range(2):
        start = configs.lead(conv) + side * conv.stride[1] * c
        packed[side, :, :, start : start + s * c] = rows
    return packed


def launches(problem: Problem, plan: Plan, chip: Chip, tf32: bool) -> tuple[Launch, None]:
    """The launch of (x, w, bias, residual or None, y), and no second one."""
    conv = problem.conv
    n, c, h, w = problem.shape
    _, k, oh, ow = problem.output_shape()
    tile, dtype = plan.tile, problem.types.source
    constants = {
        "C": c,
        "K": k,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        **dict(zip(("STRIDE_H", "STRIDE_W"), conv.stride, strict=True)),
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        "DILATION_H": conv.dilation[0],
        "LEAD": configs.lead(conv),
        **epilogue_constants(problem.epilogue),
        "WIDE": configs.wide(problem),
        "PRECISION": chip.precision(tf32),
        # What of x is set to 0 is in registers.
        "REGISTERS": chip.unit == "wgmma",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": 8,
    }
    main = Launch(
        conv2d_pairs_fwd_kernel,
        (dtype, dtype, dtype, dtype if problem.epilogue.residual else None, dtype),
        (n, h, w * c // configs.UNIT, oh, ow // 2),
        constants,
        (triton.cdiv(n * oh * ow, tile.m) * triton.cdiv(k, tile.n), 1, 1),
        tile.warps,
        tile.stages,
    )
    return main, None


def bind(problem: Problem, plan: Plan, chip: Chip, tf32: bool) -> Callable[..., None]:
    """A function of (x, w, bias, residual, y), all channels_last and aligned, that fills y."""
    return launches(problem, plan, chip, tf32)[0].bind()
