"""Gates, and batch norms that follow no convolution, with a concatenation before and a sum and a function after: one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Kind, Problem


class OnePass(Implementation):
    """y = act((x · scale + shift) · gate + residual), each part but x being optional; csrc/cpu/pass.h."""

    name = "one pass"
    kinds = frozenset({Kind.ELEMENTWISE, Kind.AFFINE})

    def why_not(self, problem: Problem) -> str | None:
        (step,) = problem.steps
        if problem.kind is Kind.ELEMENTWISE and not step.epilogue.gate:
            return f"it has no kernel for {problem.label}, which stock computes in as few passes"
        return "it has no kernel for a pool after a pass" if step.epilogue.pool is not None else None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        epilogue, scale, shift = problem.epilogue, None, None
        if problem.kind is Kind.AFFINE:
            scale, shift = parameters.pack(("cpu", "affine"), lambda: _packed(parameters))

        def record(chain: Chain, x: int, residual: int | None, *more: int) -> int:
            concatenated, gate = (more[:-1], more[-1]) if epilogue.gate else (more, None)
            return chain.one_pass([x, *concatenated], gate, residual, scale, shift, epilogue)

        return in_its_format(ChainKernel(problem, record), problem)


def _packed(parameters: ConvParameters) -> tuple[Tensor, Tensor]:
    """Scale and shift as the kernel takes them."""
    (scale,), (shift,) = parameters.tensors()
    return scale.detach().to(torch.float32).contiguous(), shift.detach().to(torch.float32).contiguous()
