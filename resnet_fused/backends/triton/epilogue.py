"""What follows the sums of a convolution, on its accumulators: y = activation(sums + bias + residual), rounded once.

All in float32. NaN and infinities become what stock PyTorch's own kernels make of them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from resnet_fused.backends.problem import Epilogue


def epilogue_constants(epilogue: Epilogue) -> dict[str, Any]:
    """The kernels' compile-time constants for what follows the sums."""
    return {"ACTIVATION": epilogue.activation.value, "SLOPE": epilogue.slope}


@triton.jit
def overflow(acc, dtype: tl.constexpr):
    """acc with an Inf where stock PyTorch has one: it stores what it adds a residual to, or takes a function of, as float16."""
    if dtype == tl.float16:
        # 65520 is the smallest number that float16 rounds to Inf.
        acc = tl.where(tl.abs(acc) < 65520.0, acc, acc * float("inf"))
    return acc


@triton.jit
def clamp(y, low, high):
    """min(max(y, low), high), where NaN stays NaN."""
    return tl.minimum(tl.maximum(y, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The function of that name in Activation; SLOPE: of a leaky ReLU, below zero."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = clamp(y, 0.0, 6.0)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0.0, y, y * SLOPE)
    elif ACTIVATION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-y))
    elif ACTIVATION == "silu":
        # At -inf it is -inf / inf, a NaN, as stock's is.
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "hardsigmoid":
        y = clamp(y + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardswish":
        y = y * clamp(y + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + e^-2u), with u = sqrt(2 / pi) (y + 0.044715 y^3)
        y = y / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (y + 0.044715 * y * y * y)))
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that the kernels don't have")
    return y


@triton.jit
def activated(acc, dtype: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The function of sums that are complete; dtype is the result's."""
    if ACTIVATION != "none" and ACTIVATION != "relu":
        acc = overflow(acc, dtype)
    return activate(acc, ACTIVATION, SLOPE)


@triton.jit
def finish(
    acc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    m,
    M,
    k,
    first,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Adds bias and residual, applies the function, stores channels first + k of rows m of y, STRIDE apart."""
    channel = k < K
    acc += tl.load(bias_ptr + first + k, mask=channel, other=0.0).to(tl.float32)[None, :]
    offsets = m[:, None] * STRIDE + (first + k)[None, :]
    inside = (m < M)[:, None] & channel[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if residual_ptr is not None:
        acc = overflow(acc, dtype)
        acc += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    acc = activated(acc, dtype, ACTIVATION, SLOPE)
    tl.store(y_ptr + offsets, acc.to(dtype), mask=inside)
