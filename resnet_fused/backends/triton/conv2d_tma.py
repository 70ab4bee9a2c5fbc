"""The convolution of conv2d.py with tensor descriptors (TMA), from compute capability 9.0 on.

A program computes a box of images × rows × columns of pixels. What one filter tap reads for it is the same box, moved, so that
one bulk copy by the TMA unit fetches it, computes all addresses, and fills in zeros for the padding. Threads hold no
offsets and no masks. Served are stride 1 and 1×1 filters of any stride, where every other pixel is a tensor of its own with
larger strides; channels in and out must be multiples of 8, because the strides of a descriptor are multiples of 16 bytes.

Source: PTX ISA, tensors in tiled mode and cp.async.bulk.tensor.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import Problem
from resnet_fused.backends.triton.boxes import box_of, grid_of_pixels, programs
from resnet_fused.backends.triton.configs import Plan
from resnet_fused.backends.triton.conv2d import overflow
from resnet_fused.backends.triton.launch import Box, Launch


@triton.jit(do_not_specialize=["tiles_h", "tiles_w"])
def conv2d_tma_fwd_kernel(
    x_desc,  # (N, H, W, C), in boxes of BOX_N × BOX_H × BOX_W × BLOCK_K
    w_desc,  # (K, R * S * C), every tap padded to whole steps, in boxes of BLOCK_N × BLOCK_K
    shift_ptr,  # (K,)
    residual_desc,  # as y, or None
    y_desc,  # (N, OH, OW, K), in boxes of BOX_N × BOX_H × BOX_W × BLOCK_N
    tiles_h,
    tiles_w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RELU: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    # Tiles that run together share their pixels first, then the rows of an image.
    pid = tl.program_id(0)
    k = pid % TILES_N * BLOCK_N
    pid = pid // TILES_N
    w = pid % tiles_w * BOX_W
    pid = pid // tiles_w
    h = pid % tiles_h * BOX_H
    n = pid // tiles_h * BOX_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = 0
    s = 0
    c = 0
    for step in range(0, STEPS):
        x = x_desc.load([n, h - PAD_H + r * DILATION_H, w - PAD_W + s * DILATION_W, c])
        weight = w_desc.load([k, step * BLOCK_K])
        acc = tl.dot(x.reshape(BLOCK_M, BLOCK_K), weight.T, acc)
        c += BLOCK_K
        tap_done = c >= C
        c = tl.where(tap_done, 0, c)
        s = tl.where(tap_done, s + 1, s)
        row_done = s == S
        s = tl.where(row_done, 0, s)
        r = tl.where(row_done, r + 1, r)

    channel = k + tl.arange(0, BLOCK_N)
    acc += tl.load(shift_ptr + channel, mask=channel < K, other=0.0).to(tl.float32)[None, :]
    if residual_desc is not None:
        acc = overflow(acc, y_desc.dtype)
        acc += residual_desc.load([n, h, w, k]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_desc.store([n, h, w, k], acc.to(y_desc.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))


def launch(problem: Problem, plan: Plan) -> Launch:
    """The launch of descriptors of x and w, shift, and descriptors of residual (or None) and y."""
    (conv,) = problem.convs
    tile, dtype = plan.tile, problem.dtype
    (_, c, h, w), k = problem.shape, conv.out_channels
    size, box = grid_of_pixels(problem), box_of(problem, tile.m)
    # A 1×1 filter sees only every stride-th pixel.
    step_h, step_w = conv.stride
    x_size = size if conv.pointwise else (problem.shape[0], h, w)
    x_strides = (h * w * c, step_h * w * c, step_w * c, 1)
    y_strides = (size[1] * size[2] * k, size[2] * k, k, 1)
    if conv.pointwise and conv.stride == (1, 1):
        x_strides = (size[2] * c, size[2] * c, c, 1)
    width = plan.steps(conv) * plan.block_k
    result = Box(dtype, (*size, k), y_strides, (*box, tile.n))
    constants = {
        "C": c,
        "K": k,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        **dict(zip(("DILATION_H", "DILATION_W"), conv.dilation, strict=True)),
        "RELU": problem.op != "conv2d_bn",
        **dict(zip(("BOX_N", "BOX_H", "BOX_W"), box, strict=True)),
        "BLOCK_N": tile.n,
        "BLOCK_K": plan.block_k,
    }
    return Launch(
        conv2d_tma_fwd_kernel,
        (
            Box(dtype, (*x_size, c), x_strides, (*box, plan.block_k)),
            Box(dtype, (k, width), (width, 1), (tile.n, plan.block_k)),
            dtype,
            result if problem.op == "conv2d_bn_add_relu" else None,
            result,
        ),
        (math.ceil(size[1] / box[1]), math.ceil(size[2] / box[2])),
        constants,
        (programs(size, box) * math.ceil(k / tile.n), 1, 1),
        tile.warps,
        tile.stages,
    )


def bind(problem: Problem, plan: Plan) -> Callable[..., None]:
    """A function of (x, w, shift, residual, y), all channels_last and aligned, that fills y."""
    bound = launch(problem, plan)
    run = bound.bind()
    boxes = [tensor for tensor in bound.tensors if isinstance(tensor, Box)]
    of_x, of_w, *_, of_y = [box.maker() for box in boxes]

    def launch_on(x: Tensor, w: Tensor, shift: Tensor, residual: Tensor | None, y: Tensor) -> None:
        run(of_x(x), of_w(w), shift, None if residual is None else of_y(residual), of_y(y))

    return launch_on
