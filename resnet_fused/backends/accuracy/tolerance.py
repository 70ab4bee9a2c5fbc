"""The promise on rounding: how large the error of a result may be.

The error is ‖y − truth‖ / ‖truth‖ with the truth in float64. Ours is at most `TIMES_STOCK` times that of stock PyTorch at the
same dtype, or the dtype's `FLOOR`, whichever is larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
