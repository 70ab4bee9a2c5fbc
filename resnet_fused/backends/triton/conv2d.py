"""The kernels of conv2d_bn, conv2d_bn_relu and conv2d_bn_add_relu: convolution as an implicit matrix product.

    y[m, k] = act(Σ_j x_window[m, j] · w[k, j] + bias[k] + residual[m, k])

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
from resnet_fused.backends.triton.configs import Chip, Plan
from resnet_fused.backends.triton.epilogue import epilogue_constants, finish
from resnet_fused.backends.triton.launch import Launch

POINTWISE = tl.constexpr(configs.POINTWISE)
TAPS = tl.constexpr(configs.TAPS)
ROWS = tl.constexpr(configs.ROWS)


@triton.jit
def tile_of(pid, tiles_m, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program, in strips of GROUP_M row tiles, so that neighbours in time share rows in L2."""
    strip = pid // (GROUP_M * TILES_N)
    first = strip * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * TILES_N)
    return first + within % height, within // height


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as matrix units take it. They would cut float32 off to TF32, which has twice the error of rounding it to nearest."""
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def settled(acc, REGISTERS: tl.constexpr):
    """acc; with REGISTERS the loop's next turn begins when the wgmma that made it, and those before it, have ended.

    Triton 3.6 doesn't see to that where a wgmma takes x from registers: the next turn writes into these while they are read.
    Any use of acc makes it wait. This one is no instruction.
    """
    if REGISTERS:
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "steps_per_split"])
def conv2d_fwd_kernel(
    x_ptr,  # (N, H, W, GROUPS * C)
    w_ptr,  # (GROUPS * K, STEPS * BLOCK_K), see `pack`
    bias_ptr,  # (GROUPS * K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, OW, GROUPS * K); with SPLIT the partial sums, (splits, N, OH, OW, GROUPS * K) of float32
    N,
    H,
    W,
    OH,
    OW,
    steps_per_split,
    C: tl.constexpr,  # channels of one group
    K: tl.constexpr,
    GROUPS: tl.constexpr,
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
    C_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = R if WALK == ROWS else R * S * C_STEPS
    if WIDE:
        N = N.to(tl.int64)
    M = N * OH * OW
    tiles_m = tl.cdiv(M, BLOCK_M)

    pid = tl.program_id(0)
    group = 0
    if GROUPS > 1:
        group = pid // (tiles_m * TILES_N)
        pid = pid % (tiles_m * TILES_N)
    tile_m, tile_n = tile_of(pid, tiles_m, TILES_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)

    # Rows after the last one read the last one again, which needs no mask; they are not stored.
    row = tl.minimum(m, M - 1)
    if WALK == POINTWISE and STRIDE_H == 1 and STRIDE_W == 1:
        x_rows = x_ptr + (row * (GROUPS * C) + group * C)[:, None] + lane[None, :]
        h0 = row
        w0 = row
    else:
        image = row // (OH * OW)
        pixel = row % (OH * OW)
        h0 = (pixel // OW) * STRIDE_H - PAD_H
        w0 = (pixel % OW) * STRIDE_W - PAD_W
        x_rows = x_ptr + (((image * H + h0) * W + w0) * (GROUPS * C) + group * C)[:, None] + lane[None, :]
        h0 = h0.to(tl.int32)
        w0 = w0.to(tl.int32)
    k_row = k if K % BLOCK_N == 0 else tl.minimum(k, K - 1)
    if WIDE:
        k_row = k_row.to(tl.int64)
    w_rows = w_ptr + ((group * K + k_row) * (STEPS * BLOCK_K))[None, :] + lane[:, None]

    first_step = 0
    last_step = STEPS
    if SPLIT:
        first_step = tl.program_id(1) * steps_per_split
        last_step = tl.minimum(first_step + steps_per_split, STEPS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if WALK == POINTWISE:
        for step in range(first_step, last_step):
            if C % BLOCK_K == 0:
                x = tl.load(x_rows + step * BLOCK_K)
            else:
                x = tl.load(x_rows + step * BLOCK_K, mask=(step * BLOCK_K + lane < C)[None, :], other=0.0)
            w = tl.load(w_rows + step * BLOCK_K)
            acc = settled(tl.dot(operand(x, PRECISION), w, acc, input_precision=PRECISION), REGISTERS)
    elif WALK == TAPS:
        r = first_step // (S * C_STEPS)
        s = first_step // C_STEPS % S
        c = first_step % C_STEPS * BLOCK_K
        for step in range(first_step, last_step):
            h = h0 + r * DILATION_H
            w_pos = w0 + s * DILATION_W
            # As unsigned numbers negative positions are large: one comparison checks both ends.
            inside = ((h.to(tl.uint32, bitcast=True) < H) & (w_pos.to(tl.uint32, bitcast=True) < W))[:, None]
            if C % BLOCK_K != 0:
                inside = inside & (c + lane < C)[None, :]
            tap = (r * DILATION_H * W + s * DILATION_W) * (GROUPS * C) + c
            x = tl.load(x_rows + tap, mask=inside, other=0.0)
            w = tl.load(w_rows + step * BLOCK_K)
            acc = settled(tl.dot(operand(x, PRECISION), w, acc, input_precision=PRECISION), REGISTERS)
            c += BLOCK_K
            tap_done = c >= C
            c = tl.where(tap_done, 0, c)
            s = tl.where(tap_done, s + 1, s)
            row_done = s == S
            s = tl.where(row_done, 0, s)
            r = tl.where(row_done, r + 1, r)
    else:
        column = lane // C
        w_pos = w0[:, None] + (column * DILATION_W)[None, :]
        across = (w_pos.to(tl.uint32, bitcast=True) < W) & (column < S)[None, :]
        x_lanes = x_rows + (column * (DILATION_W * GROUPS * C - C))[None, :]
        for r in range(first_step, last_step):
            h = h0 + r * DILATION_H
            inside = across & (h.to(tl.uint32, bitcast=True) < H)[:, None]
            x = tl.load(x_lanes + r * (DILATION_H * GROUPS * C) * W, mask=inside, other=0.0)
            w = tl.load(w_rows + r * BLOCK_K)
            acc = settled(tl.dot(operand(x, PRECISION), w, acc, input_precision=PRECISION), REGISTERS)

    first = group * K
    if SPLIT:
        part = tl.program_id(1).to(tl.int64) * M * (GROUPS * K)
        offsets = m[:, None] * (GROUPS * K) + (first + k)[None, :]
        tl.store(y_ptr + part + offsets, acc, mask=(m < M)[:, None] & (k < K)[None, :])
    else:
        finish(acc, bias_ptr, residual_ptr, y_ptr, m, M, k, first, K, GROUPS * K, ACTIVATION, SLOPE)


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
    finish(acc, bias_ptr, residual_ptr, y_ptr, m, M, k, 0, K, K, ACTIVATION, SLOPE)


def pack(weight: Tensor, conv: Conv, plan: Plan) -> Tensor:
    """The weight (K, C, R, S) as K rows in R-S-C order, every step of the plan's walk padded with zeros to block_k."""
    k, c, r, s = weight.shape
    steps = weight.detach().permute(0, 2, 3, 1)
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
    pixels, group_k, tile = n * oh * ow, k // conv.groups, plan.tile
    split, dtype = plan.splits > 1, problem.types.source
    residual = dtype if problem.epilogue.residual else None
    precision, steps = chip.precision(tf32), plan.steps(conv)
    steps_per_split = triton.cdiv(steps, plan.splits)
    splits = triton.cdiv(steps, steps_per_split)
    constants = {
        "C": c // conv.groups,
        "K": group_k,
        "GROUPS": conv.groups,
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
    tiles = triton.cdiv(pixels, tile.m) * triton.cdiv(group_k, tile.n) * conv.groups
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
