"""The one table of tolerances, and the comparison that uses it. It is never loosened for a machine or for CI.

The error of a result is ‖y − truth‖ / ‖truth‖ with the truth computed in float64 from the same inputs. Ours may be at most
twice that of stock PyTorch at the same dtype on the same inputs, or the floor of the dtype, whichever is larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMES_STOCK = 2.0

# About 16 roundings for float32, where algorithms may sum in another order; half a unit in the last place for the half-width
# types, whose results are rounded once from float32.
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def relative_error(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖ over the elements where the truth is finite."""
    finite = truth.isfinite()
    scale = truth.detach()[finite].norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((y.detach().double()[finite] - truth[finite]).norm() / scale).item()


def assert_as_good_as_stock(ours: Tensor, stock: Tensor, truth: Tensor) -> None:
    """Asserts shape and dtype of stock's result, its NaN and Inf, and an error within the tolerance."""
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    assert truth.dtype == torch.float64
    missing = ~stock.isfinite() & ours.isfinite()
    assert not missing.any(), "a NaN or Inf of stock's disappeared"
    assert torch.equal(ours.isnan(), stock.isnan()), "a NaN appeared, or an Inf became one"
    truth = torch.where(stock.isfinite(), truth, torch.full_like(truth, float("nan")))
    error, yardstick = relative_error(ours, truth), relative_error(stock, truth)
    allowed = max(TIMES_STOCK * yardstick, FLOOR[ours.dtype])
    assert error <= allowed, f"relative error {error:.2e}, stock's {yardstick:.2e}, allowed {allowed:.2e}"
