"""Whether a kernel computes a problem as it should: compared with float64, with stock PyTorch as the yardstick.

Where kernels compute in TF32, exact sums of operands rounded to it are one too: for some problems stock takes float32 though
TF32 is allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Kernel, Problem, stock, tf32
from resnet_fused.backends.problem import RESIDUAL
from resnet_fused.tolerance import allowed, relative_error

# Images that are compared with float64: half of them the first, half the last. Those between are compared with stock's.
_IMAGES = 8
# Two right results differ by the sum of their errors; the images between have errors of their own.
_SLACK = 1.5


class Truth:
    """A problem's input, with its result in float64 and by stock, to compare kernels with.

    Args:
        problem, parameters: the problem and its parameters.
        special: also compare results for an input with NaN and Inf, and, where that fits, for a residual that is the input.
    """

    def __init__(self, problem: Problem, parameters: ConvParameters, special: bool = True) -> None:
        reference = stock()
        self._stock = reference.prepare(problem, parameters)
        self._exact = reference.prepare(problem.with_dtype(torch.float64), parameters.to(torch.float64))
        self._rounded = tf32.exact(problem, parameters) if tf32.used(problem) else None
        self.x, self.residual = _inputs(problem)
        images = problem.shape[0]
        ends = range(images) if images <= _IMAGES else (*range(_IMAGES // 2), *range(images - _IMAGES // 2, images))
        self._ends = torch.tensor([*ends], device=problem.device)
        self._cases = [_Case(self, self.x, self.residual)]
        if special:
            self._cases.append(_Case(self, *_with_nan(self.x, self.residual)))
            if self.residual is not None and self.residual.shape == self.x.shape:
                self._cases.append(_Case(self, self.x, self.x))

    def fault(self, kernel: Kernel) -> str | None:
        """What is wrong with a kernel's results; None if nothing is."""
        return next((fault for case in self._cases if (fault := case.fault(kernel)) is not None), None)


class _Case:
    """One input, and what stock and float64 make of it."""

    def __init__(self, truth: Truth, x: Tensor, residual: Tensor | None) -> None:
        self._x, self._residual, self._ends = x, residual, truth._ends
        self._stock = truth._stock(x, residual)
        ends = [None if t is None else t[self._ends].double() for t in (x, residual)]
        assert ends[0] is not None
        self._exact = truth._exact(ends[0], ends[1])
        self._finite = self._exact.isfinite() & self._stock[self._ends].isfinite()
        self._error = relative_error(self._stock[self._ends], self._exact, self._finite)
        if truth._rounded is not None:
            least = truth._rounded(x[self._ends], None if residual is None else residual[self._ends])
            self._error = max(self._error, relative_error(least.to(x.dtype), self._exact, self._finite))

    def fault(self, kernel: Kernel) -> str | None:
        before = [None if t is None else t.clone() for t in (self._x, self._residual)]
        y, stock = kernel(self._x, self._residual), self._stock
        if y.shape != stock.shape or y.dtype != stock.dtype:
            return f"it gives {y.dtype} of shape {tuple(y.shape)}, and stock {stock.dtype} of {tuple(stock.shape)}"
        if not all(_same(a, b) for a, b in zip((self._x, self._residual), before, strict=True)):
            return "it changes its input"
        ours = y[self._ends]
        if (ours.isfinite() & ~stock[self._ends].isfinite() & ~self._exact.isfinite()).any():
            return "a NaN or Inf of stock's disappears"
        if (~ours.isfinite() & self._finite).any():
            return "a NaN or Inf appears"
        error, limit = relative_error(ours, self._exact, self._finite), allowed(self._error, y.dtype)
        if not error <= limit:
            return f"its relative error is {error:.1e}, and {limit:.1e} is allowed"
        return self._between(y, _SLACK * (limit + self._error))

    def _between(self, y: Tensor, limit: float) -> str | None:
        """What is wrong with the images that float64 wasn't asked for."""
        if y.shape[0] <= _IMAGES:
            return None
        half = _IMAGES // 2
        ours, stock = y[half:-half], self._stock[half:-half]
        # The NaN and Inf of `_with_nan` are in the image in the middle and in the last one.
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


def _with_nan(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same with a NaN in the middle and an Inf in a corner."""
    x = x.clone()
    x[x.shape[0] // 2, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = math.nan
    x[-1, -1, -1, -1] = math.inf
    return x, residual


def _inputs(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Random x and, where the op adds one, residual."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, dtype=problem.types.source, device=problem.device, memory_format=problem.memory_format)
        return values.normal_(generator=generator)

    return random(problem.shape), random(problem.shapes()[RESIDUAL]) if problem.reads_residual else None
