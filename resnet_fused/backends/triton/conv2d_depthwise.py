"""Depthwise convolution: every output channel reads one input channel.

    y[n, oh, ow, k] = act(Σ_rs x[n, oh · stride + r − padding, ow · stride + s − padding, k] · w[r, s, k] + bias[k] + residual)

There is nothing for a matrix unit to do, and the sums are few: what counts is how often an input element is read. A thread
has as many channels as 16 bytes hold, and a strip of ROWS × COLUMNS output pixels. It reads each pixel under the strip's
windows once, and adds it to the sums of all pixels whose window has it. Threads are numbered over strips and channels
together, channels first, so that none idles where the channels aren't a power of two.

Sums are float32, in the order of the filter's rows and columns, whatever the strip.
"""

# Tuples grow by sums in the kernels: Triton has no other way.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.problem import Conv, Problem
from resnet_fused.backends.triton.configs import Chip
from resnet_fused.backends.triton.epilogue import activated, epilogue_constants, overflow
from resnet_fused.backends.triton.launch import Launch

_LARGEST_FILTER = 7
# With more taps unrolled, or a wider row under the windows, ptxas reads more ahead than there are registers for.
_MOST_TAPS_UNROLLED = 9
_WIDEST_ROW = 10
_MOST_LANES = 1024
_HOPELESS = 3.0


@triton.jit
def add_tap(acc, x, w, r: tl.constexpr, s: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """acc plus x times the weight of row r and column s of the filter, if the filter has them; w: R · S weights."""
    if r >= 0 and r < R and s >= 0 and s < S:
        acc += x * w[r * S + s].to(tl.float32)
    return acc


@triton.jit
def add_row(
    acc,  # ROWS * COLUMNS sums
    x_row,  # the input's row i under the strip's windows
    row_inside,
    w0,
    W,
    w,  # R * S weights
    i: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums plus what one row of the input adds to them."""
    for j in tl.static_range((COLUMNS - 1) * STRIDE_W + S):
        # As unsigned numbers negative positions are large: one comparison checks both ends.
        inside = row_inside & ((w0 + j).to(tl.uint32, bitcast=True) < W)
        x = tl.load(x_row + j * C, mask=inside, other=0.0).to(tl.float32)
        added = ()
        for pixel in tl.static_range(ROWS * COLUMNS):
            tap = add_tap(acc[pixel], x, w, i - pixel // COLUMNS * STRIDE_H, j - pixel % COLUMNS * STRIDE_W, R, S)
            added = added + (tap,)
        acc = added
    return acc


@triton.jit
def weights_of_row(w_row, K: tl.constexpr, S: tl.constexpr):
    """The S weights of a row of the filter."""
    w = ()
    for s in tl.static_range(S):
        w = w + (tl.load(w_row + s * K),)
    return w


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW"])
def conv2d_depthwise_fwd_kernel(
    x_ptr,  # (N, H, W, K // MULTIPLIER)
    w_ptr,  # (R * S, K)
    bias_ptr,  # (K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, OH, OW, K)
    N,
    H,
    W,
    OH,
    OW,
    K: tl.constexpr,
    MULTIPLIER: tl.constexpr,  # output channels of an input channel
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    UNROLLED: tl.constexpr,  # the filter's rows; else ROWS is 1
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVISOR: tl.constexpr,  # the greatest common one of BLOCK and K
):
    C: tl.constexpr = K // MULTIPLIER
    PIXELS: tl.constexpr = ROWS * COLUMNS
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    first *= BLOCK
    across = tl.cdiv(OW, COLUMNS)
    strips_of_image = tl.cdiv(OH, ROWS) * across
    strips = N * strips_of_image

    # The change of its type hides from the compiler what the number is a multiple of.
    lane = tl.multiple_of((first % K).to(tl.int32), DIVISOR) + tl.arange(0, BLOCK)
    k = lane % K
    strip = (first // K).to(tl.int32) + lane // K
    active = strip < strips
    # Lanes after the last strip read that one again; they are not stored.
    strip = tl.minimum(strip, strips - 1)
    image = strip // strips_of_image
    within = strip % strips_of_image
    oh = within // across * ROWS
    ow = within % across * COLUMNS
    h0 = oh * STRIDE_H - PAD_H
    w0 = ow * STRIDE_W - PAD_W
    if WIDE:
        image = image.to(tl.int64)
    x_lane = x_ptr + ((image * H + h0) * W + w0) * C + k // MULTIPLIER

    acc = ()
    for _ in tl.static_range(PIXELS):
        acc = acc + (tl.zeros((BLOCK,), tl.float32),)
    if UNROLLED:
        w = ()
        for i in tl.static_range((ROWS - 1) * STRIDE_H + R):
            if i < R:
                w = w + weights_of_row(w_ptr + i * S * K + k, K, S)
            inside = (h0 + i).to(tl.uint32, bitcast=True) < H
            acc = add_row(acc, x_lane + i * W * C, inside, w0, W, w, i, C, R, S, STRIDE_H, STRIDE_W, ROWS, COLUMNS)
    else:
        for r in range(R):
            w = weights_of_row(w_ptr + r * (S * K) + k, K, S)
            inside = (h0 + r).to(tl.uint32, bitcast=True) < H
            acc = add_row(acc, x_lane + r * W * C, inside, w0, W, w, 0, C, 1, S, STRIDE_H, STRIDE_W, 1, COLUMNS)

    bias = tl.load(bias_ptr + k).to(tl.float32)
    y_lane = ((image * OH + oh) * OW + ow) * K + k
    # All of the residual before the first store, so that its reading takes one latency.
    residual = ()
    if residual_ptr is not None:
        for pixel in tl.static_range(PIXELS):
            inside = (oh + pixel // COLUMNS < OH) & (ow + pixel % COLUMNS < OW)
            offsets = y_lane + (pixel // COLUMNS * OW + pixel % COLUMNS) * K
            residual = residual + (tl.load(residual_ptr + offsets, mask=inside, other=0.0),)
    for pixel in tl.static_range(PIXELS):
        inside = (oh + pixel // COLUMNS < OH) & (ow + pixel % COLUMNS < OW) & active
        offsets = y_lane + (pixel // COLUMNS * OW + pixel % COLUMNS) * K
        y = acc[pixel] + bias
        if residual_ptr is not None:
            y = overflow(y, dtype) + residual[pixel].to(tl.float32)
        y = activated(y, dtype, ACTIVATION, SLOPE)
        tl.store(y_ptr + offsets, y.to(dtype), mask=inside)


@dataclass(frozen=True)
class Strip:
    """One way to divide the output pixels.

    Attributes:
        rows: output pixels of a thread, down.
        columns: output pixels of a thread, across.
        warps: warps of a program.
        why: what the entry is good for.
    """

    rows: int
    columns: int
    warps: int
    why: str

    @property
    def name(self) -> str:
        return f"depthwise-{self.rows}x{self.columns}-w{self.warps}"

    def fits_registers(self, conv: Conv, wide: bool) -> bool:
        """Whether it compiles without spills; `wide` is for offsets of 64 bits."""
        if not _unrolled(conv) and (self.rows > 1 or (wide and self.columns == 2)):
            return False
        return (self.columns - 1) * conv.stride[1] + conv.kernel[1] <= _WIDEST_ROW

    def accesses(self, conv: Conv, residual: bool) -> int:
        """Accesses of 16 bytes that a thread makes."""
        (r, s), (down, across) = conv.kernel, conv.stride
        pixels = ((self.rows - 1) * down + r) * ((self.columns - 1) * across + s)
        return pixels + r * s + 1 + self.rows * self.columns * (1 + residual)

    def programs(self, problem: Problem) -> int:
        n, k, oh, ow = problem.output_shape()
        strips = n * math.ceil(oh / self.rows) * math.ceil(ow / self.columns)
        return math.ceil(strips * k / self.block(problem.types.source))

    def block(self, dtype: torch.dtype) -> int:
        """Elements of a program at each of its strips' pixels: 16 bytes a thread."""
        return 32 * self.warps * 16 // dtype.itemsize


STRIPS = (
    Strip(1, 1, 2, "the most threads: 7×7 at batch 1"),
    Strip(1, 2, 4, "half of the reading, for strides of 2, and where 4 columns don't divide an image"),
    Strip(2, 2, 4, "7×7 and 14×14: reads 16 pixels for 4 of a 3×3, and wastes few threads at borders"),
    Strip(1, 4, 4, "reads 18 pixels for 4 of a 3×3 with neighbours in a row: large images"),
)


def why_not(problem: Problem) -> str | None:
    """Why the kernel can't serve a convolution that the backend serves; None if it can."""
    conv = problem.conv
    if conv.groups == 1 or conv.groups != conv.in_channels:
        return "it is not depthwise"
    if conv.dilation != (1, 1):
        return f"it has no kernel for depthwise filters of dilation {conv.dilation}"
    if max(conv.kernel) > _LARGEST_FILTER:
        return f"it has no kernel for depthwise filters larger than {_LARGEST_FILTER}×{_LARGEST_FILTER}"
    n, _, oh, ow = problem.output_shape()
    if n * oh * ow >= 2**31:
        return "it has no kernel for 2³¹ or more pixels"
    return None


def plans(problem: Problem, chip: Chip) -> list[Strip]:
    """The strips that are worth a measurement: by the model no more than three times slower than the best, which is first."""
    fitting = [strip for strip in STRIPS if strip.fits_registers(problem.conv, _wide(problem))]
    found = sorted(fitting, key=lambda strip: _cost(strip, problem, chip))
    return [strip for strip in found if _cost(strip, problem, chip) <= _HOPELESS * _cost(found[0], problem, chip)]


def _cost(strip: Strip, problem: Problem, chip: Chip) -> int:
    """Modelled time: accesses of the SM that has the most programs, in those of a warp."""
    programs = math.ceil(strip.programs(problem) / chip.multiprocessors)
    return programs * strip.warps * strip.accesses(problem.conv, problem.epilogue.residual)


def _unrolled(conv: Conv) -> bool:
    return math.prod(conv.kernel) <= _MOST_TAPS_UNROLLED


def _wide(problem: Problem) -> bool:
    """Whether offsets need 64 bits: those of the last program's idle lanes, too."""
    return max(math.prod(problem.shape), math.prod(problem.output_shape())) >= 2**31 - _MOST_LANES


def pack(weight: Tensor) -> Tensor:
    """The weight (K, 1, R, S) as (R · S, K)."""
    return weight.detach().flatten(1).t().contiguous()


def launch(problem: Problem, strip: Strip) -> Launch:
    """The launch of (x, w, bias, residual or None, y), all channels_last and aligned."""
    conv, dtype = problem.conv, problem.types.source
    n, c, h, w = problem.shape
    _, k, oh, ow = problem.output_shape()
    constants = {
        "K": k,
        "MULTIPLIER": k // c,
        **dict(zip(("R", "S"), conv.kernel, strict=True)),
        **dict(zip(("STRIDE_H", "STRIDE_W"), conv.stride, strict=True)),
        **dict(zip(("PAD_H", "PAD_W"), conv.padding, strict=True)),
        **epilogue_constants(problem.epilogue),
        "WIDE": _wide(problem),
        "UNROLLED": _unrolled(conv),
        "ROWS": strip.rows,
        "COLUMNS": strip.columns,
        "BLOCK": strip.block(dtype),
        "DIVISOR": math.gcd(strip.block(dtype), k),
    }
    return Launch(
        conv2d_depthwise_fwd_kernel,
        (dtype, dtype, dtype, dtype if problem.epilogue.residual else None, dtype),
        (n, h, w, oh, ow),
        constants,
        (strip.programs(problem), 1, 1),
        strip.warps,
    )
