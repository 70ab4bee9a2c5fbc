"""Whether a candidate computes a problem as it should: compared with float64, with stock PyTorch as the yardstick.

Where kernels compute in TF32, exact sums of operands rounded to it are one too: for some problems stock takes float32 though
TF32 is allowed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from resnet_fused.backends import Kernel, get, tf32
from resnet_fused.backends.problem import Folded, Problem
from resnet_fused.tolerance import allowed

_IMAGES_AT_ONCE = 4


class Truth:
    """Results of a problem in float64 and by stock, to compare candidates with."""

    def __init__(self, problem: Problem, folded: Folded) -> None:
        reference = get("reference")
        stock = reference.prepare(problem, folded)
        self.exact = reference.prepare(replace(problem, dtype=torch.float64), folded.to(torch.float64))
        x, residual = inputs = _inputs(problem)
        self.cases = [inputs, _with_nan(*inputs)]
        if residual is not None and residual.shape == x.shape:
            self.cases.append((x, x))
        self.stock = [stock(*case) for case in self.cases]
        error = self._error(inputs, self.stock[0])
        if tf32.used(problem):
            error = max(error, self._error(inputs, _by_parts(tf32.exact(problem, folded), inputs)))
        self.allowed = allowed(error, problem.dtype)

    def fault(self, kernel: Kernel) -> str | None:
        """What is wrong with a candidate's results; None if nothing is."""
        for number, (case, stock) in enumerate(zip(self.cases, self.stock, strict=True)):
            before = [None if t is None else t.clone() for t in case]
            y = kernel(*case)
            if y.shape != stock.shape or y.dtype != stock.dtype:
                return f"it gives {y.dtype} of shape {tuple(y.shape)}, and stock {stock.dtype} of {tuple(stock.shape)}"
            if not all(_same(a, b) for a, b in zip(case, before, strict=True)):
                return "it changes its input"
            if (y.isfinite() & ~stock.isfinite()).any():
                return "a NaN or Inf of stock's disappears"
            if number != 1:
                error = self._error(case, y)
                if not error <= self.allowed:
                    return f"its relative error is {error:.1e}, and {self.allowed:.1e} is allowed"
        return None

    def _error(self, case: tuple[Tensor, Tensor | None], y: Tensor) -> float:
        """‖y − truth‖ / ‖truth‖, a few images at a time, so that float64 doesn't fill the memory."""
        x, residual = case
        difference = size = 0.0
        for first in range(0, x.shape[0], _IMAGES_AT_ONCE):
            part = slice(first, first + _IMAGES_AT_ONCE)
            truth = self.exact(x[part].double(), None if residual is None else residual[part].double())
            difference += float((y[part].double() - truth).square().sum())
            size += float(truth.square().sum())
        return math.sqrt(difference / size) if size else math.sqrt(difference)


def _by_parts(kernel: Kernel, case: tuple[Tensor, Tensor | None]) -> Tensor:
    """The results of a kernel in float64, stored in the input's type, a few images at a time as well."""
    x, residual = case
    parts = zip(
        x.split(_IMAGES_AT_ONCE), [None] * len(x) if residual is None else residual.split(_IMAGES_AT_ONCE), strict=False
    )
    return torch.cat([kernel(*part).to(x.dtype) for part in parts])


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
        values = torch.randn(shape, generator=generator, device=problem.device)
        return values.to(problem.dtype).contiguous(memory_format=problem.memory_format)

    adds = problem.op in ("conv2d_bn_add_relu", "add_relu")
    return random(problem.shape), random(problem.output_shape()) if adds else None
