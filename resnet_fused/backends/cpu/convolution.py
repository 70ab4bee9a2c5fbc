"""Convolutions with bias, residual and ReLU: by Winograd (3×3), and by direct sums."""

from __future__ import annotations

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cpu import plan
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.packing import packed
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Kind, Problem


def why_not_any(problem: Problem) -> str | None:
    """What no implementation of convolutions serves; None if one may."""
    if problem.epilogue.pool is not None:
        return "as a whole it serves, by Winograd, a 7×7 convolution of stride 2 on up to 4 channels with a 3×3 pool"
    return None if problem.epilogue.bias else "it serves convolutions with a bias"


def why_not_one_group(problem: Problem) -> str | None:
    """What the implementations for one group don't serve; None if one may."""
    if problem.conv.groups == 1:
        return why_not_any(problem)
    return (
        f"of several groups, here {problem.conv.groups}, it serves 3×3 convolutions, and depthwise ones of 3×3, 5×5 and 7×7, "
        "with a stride of 1 or 2 both ways and no dilation"
    )


class Winograd(Implementation):
    """F(4×4, 3×3) for stride 1, F(5×5, 3×3) on phases for stride 2; csrc/cpu/winograd.h."""

    name = "Winograd"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        reason = why_not_one_group(problem)
        if reason is not None:
            return reason
        if plan.winograd_plans(problem):
            return None
        return "Winograd serves 3×3 convolutions of stride 1, or 2 in float32 sums, where precision='direct' doesn't forbid it"

    def preferred(self, problem: Problem) -> bool:
        return plan.winograd(problem) is not None

    def plans(self, problem: Problem) -> list[str]:
        return [*plan.winograd_plans(problem)]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        plans = plan.winograd_plans(problem)
        return _kernel(problem, parameters, plans.get(plan_name or "") or next(iter(plans.values())))


class Direct(Implementation):
    """The sum over all products, for any geometry; csrc/cpu/direct.h, and pointwise.h for 1×1."""

    name = "direct"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        return why_not_one_group(problem)

    def plans(self, problem: Problem) -> list[str]:
        return ["direct"]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        return _kernel(problem, parameters, [])


def _kernel(problem: Problem, parameters: ConvParameters, numbers: list[int]) -> Kernel:
    """The kernel by a Winograd plan's numbers, or by direct sums where there are none."""
    conv, epilogue = problem.conv, problem.epilogue
    weight, bias = packed(parameters, conv, winograd=bool(numbers))
    out_channels, geometry = conv.out_channels, conv.geometry

    def record(chain: Chain, x: int, residual: int | None) -> int:
        return chain.conv(
            x, residual if epilogue.residual else None, weight, bias, out_channels, 1, geometry, epilogue, parameters, numbers
        )

    return in_its_format(ChainKernel(problem, record), problem)
