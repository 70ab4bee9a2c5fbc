"""One-pass kernels: add_relu forward and backward, and batch norm in inference with what follows it.

Every thread moves 16 bytes at a time. The arithmetic is float32, so that a sum of two float16 numbers is rounded once,
as stock PyTorch does it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.backends.triton.launch import Launch

_WARPS = 4
_THREADS = 32 * _WARPS


@triton.jit
def relu(y):
    """max(y, 0), where NaN stays NaN."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def flat_block(vectors, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """First element, lanes and mask of a program's part of `vectors` · VECTOR elements in a row.

    The mask is equal over every VECTOR lanes, which lets the compiler make one access of them.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return start, lane, lane // VECTOR < vectors - start // VECTOR


@triton.jit(do_not_specialize=["vectors"])
def add_relu_fwd_kernel(x_ptr, residual_ptr, y_ptr, vectors, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """y = relu(x + residual) over `vectors` · VECTOR elements in the same order."""
    start, lane, inside = flat_block(vectors, VECTOR, BLOCK)
    x = tl.load(x_ptr + start + lane, mask=inside).to(tl.float32)
    y = relu(x + tl.load(residual_ptr + start + lane, mask=inside).to(tl.float32))
    tl.store(y_ptr + start + lane, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["vectors"])
def add_relu_bwd_kernel(dy_ptr, y_ptr, dx_ptr, vectors, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy where y > 0 or y is NaN, else 0: the gradient by both x and the residual."""
    start, lane, inside = flat_block(vectors, VECTOR, BLOCK)
    dy = tl.load(dy_ptr + start + lane, mask=inside)
    y = tl.load(y_ptr + start + lane, mask=inside).to(tl.float32)
    tl.store(dx_ptr + start + lane, tl.where(y <= 0.0, tl.zeros_like(dy), dy), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def bn_relu_fwd_kernel(
    x_ptr,  # (rows, C)
    scale_ptr,  # (C,) of float32
    shift_ptr,  # (C,) of float32
    residual_ptr,  # as x, or None
    y_ptr,
    rows,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(x · scale + shift + residual), channels last."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c < C
    inside = (row < rows - start)[:, None] & channel[None, :]
    offsets = start * C + (row[:, None] * C + c[None, :])
    scale = tl.load(scale_ptr + c, mask=channel, other=0.0)
    shift = tl.load(shift_ptr + c, mask=channel, other=0.0)
    y = tl.load(x_ptr + offsets, mask=inside).to(tl.float32) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside).to(tl.float32)
    tl.store(y_ptr + offsets, relu(y).to(y_ptr.dtype.element_ty), mask=inside)


def _vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def add_relu_fwd(size: int, dtype: torch.dtype) -> Launch:
    """Launch of (x, residual, y) with `size` elements each."""
    return _flat(add_relu_fwd_kernel, size, dtype)


def add_relu_bwd(size: int, dtype: torch.dtype) -> Launch:
    """Launch of (dy, y, dx) with `size` elements each."""
    return _flat(add_relu_bwd_kernel, size, dtype)


def _flat(kernel: object, size: int, dtype: torch.dtype) -> Launch:
    vector = math.gcd(size, _vector(dtype))
    block = _THREADS * vector
    constants = {"VECTOR": vector, "BLOCK": block}
    return Launch(kernel, (dtype,) * 3, (size // vector,), constants, (triton.cdiv(size, block), 1, 1), _WARPS)


def bn_relu_fwd(rows: int, channels: int, dtype: torch.dtype, residual: bool) -> Launch:
    """Launch of (x, scale, shift, residual or None, y); x is `rows` pixels of `channels`; float32 scale and shift."""
    elements = 2 * _THREADS * _vector(dtype)
    block_c = min(triton.next_power_of_2(channels), 256)
    constants = {"C": channels, "BLOCK_R": elements // block_c, "BLOCK_C": block_c}
    grid = (triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(channels, block_c), 1)
    dtypes = (dtype, torch.float32, torch.float32, dtype if residual else None, dtype)
    return Launch(bn_relu_fwd_kernel, dtypes, (rows,), constants, grid, _WARPS)


def bn_relu(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(x · scale + shift + residual) for x (N, C, H, W) in channels_last, and C scales and shifts."""
    y = torch.empty_like(x)
    n, c, h, w = x.shape
    bn_relu_fwd(n * h * w, c, x.dtype, residual is not None).bind()(x, scale.float(), shift.float(), residual, y)
    return y
