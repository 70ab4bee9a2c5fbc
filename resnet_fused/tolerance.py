"""The promise on rounding: how large the error of a result may be.

The error is ‖y − truth‖ / ‖truth‖ with the truth in float64. Ours is at most `TIMES_STOCK` times that of stock PyTorch at the
same dtype, or the dtype's `FLOOR`, whichever is larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

TIMES_STOCK = 2.0

# About 16 roundings for float32, where algorithms may sum in another order; half a unit in the last place for the half-width
# types, whose results are rounded once from float32.
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def relative_error(y: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    """‖y − truth‖ / ‖truth‖ over the elements that `where` names, or over all; NaN if there is one among them."""
    difference = y.double() - truth
    if where is not None:
        difference, truth = difference[where], truth[where]
    return float(difference.norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def allowed(stock_error: float, dtype: torch.dtype) -> float:
    """The largest error that a result of this dtype may have."""
    return max(TIMES_STOCK * stock_error, FLOOR[dtype])


def difference(got: Any, want: Any, truth: Any = None) -> str | None:
    """What distinguishes a result from stock's beyond rounding; None if nothing does.

    Args:
        got, want: the result and stock's, in any structure of tensors.
        truth: stock's result in float64, by which stock's own error is known; None where there is none.
    """
    leaves, structure = _pytree.tree_flatten(got)
    stock, wanted = _pytree.tree_flatten(want)
    exact = _pytree.tree_leaves(truth) if truth is not None else [None] * len(stock)
    if structure != wanted:
        return f"it gives {structure} and stock {wanted}"
    for a, b, t in zip(leaves, stock, exact, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return f"it gives {type(a).__name__} and stock {type(b).__name__}"
        if not isinstance(b, Tensor):
            if a is not b and a != b:
                return f"it gives {a!r} and stock {b!r}"
            continue
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
            return f"it gives {_kind(a)}, and stock {_kind(b)}"
        if a.layout is not torch.strided:
            continue
        if a.stride() != b.stride():
            return f"it gives strides {a.stride()} and stock {b.stride()}"
        fault = _wrong_values(a, b, t)
        if fault is not None:
            return fault
    return None


def _kind(x: Tensor) -> str:
    return f"{type(x).__name__} of {x.dtype} and shape {tuple(x.shape)} on {x.device}"


def _wrong_values(a: Tensor, b: Tensor, truth: Tensor | None) -> str | None:
    if not b.is_floating_point():
        return None if torch.equal(a, b) else "it gives other integers than stock"
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return "a NaN or Inf appears or disappears"
    if truth is None:
        error, limit = relative_error(a, b.double(), finite), (1 + TIMES_STOCK) * FLOOR[b.dtype]
    else:
        error, limit = relative_error(a, truth, finite), allowed(relative_error(b, truth, finite), b.dtype)
    return None if error <= limit else f"its relative error is {error:.1e}, and {limit:.1e} is allowed"
