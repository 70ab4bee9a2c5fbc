"""Residual blocks as a whole: results inside of a block stay in the caches."""

from __future__ import annotations

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cpu import plan
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.packing import packed
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Kind, Problem


class WholeBlock(Implementation):
    """Basic blocks and bottlenecks of stride 1, with their 3×3 layers by Winograd; csrc/cpu/blocks.h."""

    name = "whole block"
    kinds = frozenset({Kind.PROGRAM})

    def why_not(self, problem: Problem) -> str | None:
        block = problem.block()
        if block is None:
            return f"it has no kernel for {problem.label}"
        for conv in problem.convs:
            if conv.groups != 1:
                return f"it serves convolutions of one group, not {conv.groups}"
        if not plan.whole_block_is_possible(block):
            return "as a whole it serves blocks of stride 1 whose 3×3 layers have padding and dilation 1"
        if any(not step.epilogue.bias for step in problem.steps):
            return "it serves convolutions with a bias"
        if problem.precision != "fast":
            return "as a whole it serves blocks by Winograd only, which precision='direct' forbids"
        odd = [conv.in_channels for conv in problem.convs if conv.in_channels % 2 != 0]
        if odd and plan.in_pairs(problem.dtype):
            return f"as a whole it needs even numbers of channels in bfloat16, not {odd[0]}"
        return None

    def plans(self, problem: Problem) -> list[str]:
        return [*plan.block_plans(problem)]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        block = problem.block()
        assert block is not None
        plans = plan.block_plans(problem)
        numbers = plans.get(plan_name or "") or next(iter(plans.values()))
        # By part, so that a block composed of its layers finds what was packed. The kernel takes the shortcut last.
        parts = [parameters.part(i) for i in range(len(problem.convs))]
        every = [packed(part, conv, winograd=not conv.pointwise) for part, conv in zip(parts, problem.convs, strict=True)]
        if block.shortcut is not None:
            every, parts = [*every[1:], every[0]], [*parts[1:], parts[0]]
        weights, biases = [weight for weight, _ in every], [bias for _, bias in every]
        channels = [conv.out_channels for conv in block.main]

        def record(chain: Chain, x: int, residual: int | None) -> int:
            return chain.block(x, weights, biases, channels, parts, numbers)

        return in_its_format(ChainKernel(problem, record), problem)
