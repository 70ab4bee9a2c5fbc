"""Whether a kernel computes a problem as it should: its results for random inputs, as the judge sees them.

Where kernels compute in TF32, exact sums of operands rounded to it are a yardstick too: for some problems stock takes float32
though TF32 is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Kernel, Problem, stock, tf32
from resnet_fused.backends.accuracy.judge import judge
from resnet_fused.backends.accuracy.tensors import inputs_of, more_inputs_of, with_nan_and_inf
from resnet_fused.backends.accuracy.tolerance import allowed, relative_error

# Images that are compared with float64: half of them the first, half the last. Those between are compared with stock's.
_IMAGES = 8
# Two right results differ by the sum of their errors; the images between have errors of their own.
_SLACK = 1.5


class ProblemCheck:
    """A problem's input, with its result in float64 and by stock, to compare kernels with.

    Args:
        problem, parameters: the problem and its parameters.
        special: also compare results for an input with NaN and Inf, and, where that fits, for a residual that is the input.

    Attributes:
        x, residual: the random input.
    """

    def __init__(self, problem: Problem, parameters: ConvParameters, special: bool = True) -> None:
        self._problem = problem
        reference = stock()
        self._stock = reference.prepare(problem, parameters)
        self._exact = reference.prepare(problem.with_dtype(torch.float64), parameters.to(torch.float64))
        self._rounded = tf32.exact(problem, parameters) if tf32.used(problem) else None
        self.x, self.residual = inputs_of(problem)
        self._more = more_inputs_of(problem)
        images = problem.shape[0]
        ends = range(images) if images <= _IMAGES else (*range(_IMAGES // 2), *range(images - _IMAGES // 2, images))
        self._ends = torch.tensor([*ends], device=problem.device)
        self._cases = [self._case(self.x, self.residual)]
        if special:
            self._cases.append(self._case(with_nan_and_inf(self.x), self.residual))
            if self.residual is not None and self.residual.shape == self.x.shape:
                self._cases.append(self._case(self.x, self.x))

    def fault(self, kernel: Kernel) -> str | None:
        """What is wrong with a kernel's results; None if nothing is."""
        return next((fault for case in self._cases if (fault := case.fault(kernel)) is not None), None)

    def _case(self, x: Tensor, residual: Tensor | None) -> _Case:
        x_ends, residual_ends = x[self._ends], None if residual is None else residual[self._ends]
        more_ends = [t[self._ends].double() for t in self._more]
        exact = self._exact(x_ends.double(), None if residual_ends is None else residual_ends.double(), *more_ends)
        rounded = None if self._rounded is None else self._rounded(x_ends, residual_ends).to(x.dtype)
        stock = self._stock(x, residual, *self._more)
        return _Case(x, residual, self._more, stock, exact, rounded, self._ends)


class _Case:
    """One input, and what stock and float64 make of it."""

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        more: tuple[Tensor, ...],
        stock: Tensor,
        exact: Tensor,
        rounded: Tensor | None,
        ends: Tensor,
    ) -> None:
        self._inputs = x, residual, *more
        self._stock, self._exact, self._rounded, self._ends = stock, exact, rounded, ends

    def fault(self, kernel: Kernel) -> str | None:
        before = [None if t is None else t.clone() for t in self._inputs]
        y, stock = kernel(*self._inputs), self._stock
        if y.shape != stock.shape or y.dtype != stock.dtype:
            return judge(y, stock, None).fault
        if not all(_same(a, b) for a, b in zip(self._inputs, before, strict=True)):
            return "it changes its input"
        verdict = judge(y[self._ends], stock[self._ends], self._exact, self._rounded)
        return verdict.fault or self._between(y, verdict.stock)

    def _between(self, y: Tensor, stock_error: float) -> str | None:
        """What is wrong with the images that float64 wasn't asked for."""
        if y.shape[0] <= _IMAGES:
            return None
        half = _IMAGES // 2
        ours, stock = y[half:-half], self._stock[half:-half]
        rounding = 0.0 if self._rounded is None else relative_error(self._rounded, self._exact, self._exact.isfinite())
        error = max(stock_error, rounding)
        limit = _SLACK * (allowed(error, y.dtype) + error)
        # The NaN and Inf of `with_nan_and_inf` are in the image in the middle and in the last one.
        finite = stock.isfinite()
        if not bool(finite.all()):
            if (ours.isfinite() & ~finite).any():
                return "a NaN or Inf of stock's disappears"
            ours, stock = ours[finite], stock[finite]
        norm = torch.linalg.vector_norm
        error = float(norm(ours - stock, dtype=torch.float32) / norm(stock, dtype=torch.float32).clamp_min(1e-30))
        return None if error <= limit else f"it differs from stock by {error:.1e}, and {limit:.1e} is allowed"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a.nan_to_num(), b.nan_to_num())
