"""The one judge of results: `rf.fuse`, trials, `rf.tune`, `rf.verify` and the benchmarks ask it.

A result has stock's shape and dtype. Where stock and the truth are both NaN or Inf it is so, too; where both are finite it is
finite; where both are Inf it is no NaN. Where they differ either is right: stock's own algorithm may spread a NaN, as
Winograd's do over a tile, and cuDNN's may lose one. Over the elements where all are finite, its error is at most what
`tolerance.allowed` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from resnet_fused.backends.accuracy.tolerance import FLOOR, TIMES_STOCK, allowed, relative_error


class Verdict(NamedTuple):
    """What the judge says of a result.

    Attributes:
        error, stock: relative errors of the result and of stock's.
        fault: what is wrong with it; None if nothing is.
    """

    error: float
    stock: float
    fault: str | None


def judge(ours: Tensor, stock: Tensor, truth: Tensor | None, other: Tensor | None = None) -> Verdict:
    """Judges a result of floating-point numbers.

    Args:
        ours, stock: the result, and stock PyTorch's at the same dtype.
        truth: stock's in float64. None where it isn't known: stock's is then taken for it, and the error of both is allowed.
        other: another result whose error is a yardstick, too: where kernels compute in TF32, the exact one of operands rounded
            to it; of a model, stock's in the other memory format.
    """
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        given, wanted = f"{ours.dtype} of shape {tuple(ours.shape)}", f"{stock.dtype} of shape {tuple(stock.shape)}"
        return Verdict(0.0, 0.0, f"it gives {given}, and stock {wanted}")
    exact = stock.double() if truth is None else truth
    both, places = stock.isfinite() & exact.isfinite(), ours.isfinite()
    where = both & places
    error, yardstick = relative_error(ours, exact, where), relative_error(stock, exact, both)
    lost, made = misplaced(ours, stock, exact)
    if lost:
        return Verdict(error, yardstick, "a NaN or Inf of stock's disappears")
    if made:
        return Verdict(error, yardstick, "a NaN or Inf appears")
    least = 0.0 if other is None else relative_error(other, exact, both)
    limit = (1 + TIMES_STOCK) * FLOOR[stock.dtype] if truth is None else allowed(max(yardstick, least), stock.dtype)
    fault = None if error <= limit else f"its relative error is {error:.1e}, and {limit:.1e} is allowed"
    return Verdict(error, yardstick, fault)


def misplaced(ours: Tensor, stock: Tensor, truth: Tensor) -> tuple[int, int]:
    """How many NaN and Inf of stock's and the truth's are missing in a result, and how many are there where neither has one."""
    finite = ours.isfinite()
    lost = finite & ~stock.isfinite() & ~truth.isfinite()
    made = (~finite & stock.isfinite() & truth.isfinite()) | (ours.isnan() & ~stock.isnan() & ~truth.isnan())
    return int(lost.sum()), int(made.sum())


def difference(got: Any, want: Any, truth: Any = None) -> str | None:
    """What distinguishes a model's result from stock's beyond rounding; None if nothing does.

    Args:
        got, want: the result and stock's, in any structure of tensors.
        truth: stock's result in float64; None where there is none.
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
        if not b.is_floating_point():
            fault = None if torch.equal(a, b) else "it gives other integers than stock"
        else:
            fault = judge(a, b, t).fault
        if fault is not None:
            return fault
    return None


def _kind(x: Tensor) -> str:
    return f"{type(x).__name__} of {x.dtype} and shape {tuple(x.shape)} on {x.device}"
