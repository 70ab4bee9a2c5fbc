"""The sums of the implicit matrix product: the walks of conv2d.py over its reduction."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.backends.triton import configs

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


@triton.jit
def product(x, w, acc, PRECISION: tl.constexpr, REGISTERS: tl.constexpr):
    """acc + x @ w."""
    return settled(tl.dot(operand(x, PRECISION), w, acc, input_precision=PRECISION), REGISTERS)


@triton.jit
def window_sums(
    x_rows,
    w_rows,
    h0,
    w0,
    first_c,
    H,
    W,
    first_step,
    last_step,
    C: tl.constexpr,
    IN: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WALK: tl.constexpr,
    PRECISION: tl.constexpr,
    REGISTERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of a tile over steps of the walk.

    x_rows: where windows begin in x, and w_rows in w, for each lane of a step; first_c: the channel at which windows begin.
    """
    C_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    ALL_THERE: tl.constexpr = IN % C == 0  # the last group's channels
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WALK == POINTWISE:
        for step in range(first_step, last_step):
            c = step * BLOCK_K + lane
            if C % BLOCK_K == 0 and ALL_THERE:
                x = tl.load(x_rows + step * BLOCK_K)
            else:
                x = tl.load(x_rows + step * BLOCK_K, mask=((c < C) & (first_c + c < IN))[None, :], other=0.0)
            w = tl.load(w_rows + step * BLOCK_K)
            acc = product(x, w, acc, PRECISION, REGISTERS)
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
            if not ALL_THERE:
                inside = inside & (first_c + c + lane < IN)[None, :]
            tap = (r * DILATION_H * W + s * DILATION_W) * IN + c
            x = tl.load(x_rows + tap, mask=inside, other=0.0)
            w = tl.load(w_rows + step * BLOCK_K)
            acc = product(x, w, acc, PRECISION, REGISTERS)
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
        if not ALL_THERE:
            across = across & (first_c + lane % C < IN)[None, :]
        x_lanes = x_rows + (column * (DILATION_W * IN - C))[None, :]
        for r in range(first_step, last_step):
            h = h0 + r * DILATION_H
            inside = across & (h.to(tl.uint32, bitcast=True) < H)[:, None]
            x = tl.load(x_lanes + r * (DILATION_H * IN) * W, mask=inside, other=0.0)
            w = tl.load(w_rows + r * BLOCK_K)
            acc = product(x, w, acc, PRECISION, REGISTERS)
    return acc


@triton.jit
def sums_by_group(
    x_windows,
    w_filters,
    h0,
    w0,
    first_c,
    k,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    MERGED: tl.constexpr,
    IN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WALK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of a tile of merged groups, one element of the reduction after the other, each for its group's results alone.

    x_windows: where windows begin in x, and w_filters in w; the rest as of `window_sums`.
    """
    C_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(R * S * C, num_stages=1):
        c = j % C
        s = j // C % S
        r = j // (C * S)
        h = h0 + r * DILATION_H
        w_pos = w0 + s * DILATION_W
        inside = first_c + c < IN
        if WALK != POINTWISE:
            inside = inside & (h.to(tl.uint32, bitcast=True) < H) & (w_pos.to(tl.uint32, bitcast=True) < W)
        x = tl.load(x_windows + ((r * DILATION_H * W + s * DILATION_W) * IN + c), mask=inside, other=0.0)
        place = r * BLOCK_K + s * C + c if WALK == ROWS else (r * S + s) * (C_STEPS * BLOCK_K) + c
        w = tl.load(w_filters + place)
        products = operand(x, PRECISION).to(tl.float32)[:, None] * w.to(tl.float32)[None, :]
        acc += tl.where((k // (K // MERGED) == c // (C // MERGED))[None, :], products, 0.0)
    return acc
