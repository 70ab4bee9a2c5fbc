"""One-pass kernels: add_relu forward and backward.

Every thread moves 16 bytes at a time. The arithmetic is float32, so that a sum of two float16 numbers is rounded once,
as stock PyTorch does it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

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
