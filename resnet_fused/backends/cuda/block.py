"""Residual blocks as a whole, in one kernel (csrc/cuda/bottleneck.cuh): results inside never leave the multiprocessor.

Which kernels serve a block, and how it is cut into strips, is planned in csrc/cuda/block_plan.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cuda import device
from resnet_fused.backends.cuda.convolution import ELEMENTS
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Block, Conv, Kind, Problem


class Bottleneck(Implementation):
    """Bottlenecks of stride 1 for compute capability 8.0 and newer, in float16 and bfloat16."""

    name = "whole block"
    kinds = frozenset({Kind.PROGRAM})

    def why_not(self, problem: Problem) -> str | None:
        block = problem.block()
        if block is None or len(block.main) != 3:
            return f"it has no kernel for {problem.label} as a whole"
        if not is_plain_bottleneck(block):
            return "as a whole it serves bottlenecks of 1×1, 3×3 (padding 1) and 1×1 layers of one group and stride 1"
        if any(not step.epilogue.bias for step in problem.steps):
            return "as a whole it serves convolutions with a bias"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"as a whole it serves float16 and bfloat16, not {problem.types.source}"
        if 0 in problem.shape:
            return "the input is empty"
        try:
            torch.ops.resnet_fused_cuda.block_plan(plan_problem(problem), device.properties(problem.device), [0] * 4, "")
        except (ValueError, RuntimeError) as error:  # the planner's reason
            return str(error).splitlines()[0]
        return None

    def plans(self, problem: Problem) -> list[str]:
        return torch.ops.resnet_fused_cuda.block_kernels(plan_problem(problem), device.properties(problem.device))

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        weight, bias = parameters.pack(("cuda", "block", problem.dtype), lambda: pack(*parameters.tensors()))
        numbers = plan_problem(problem)
        inner, out, projected = numbers[4], numbers[5], bool(numbers[6])
        run = torch.ops.resnet_fused_cuda.block_fwd.default
        return in_its_format(lambda x, residual: run(x, weight, bias, inner, out, projected, plan or ""), problem)


def is_plain_bottleneck(block: Block) -> bool:
    """Whether all of its geometry is a ResNet's bottleneck's without stride."""
    first, middle, last = block.main
    points = [first, last] if block.shortcut is None else [first, last, block.shortcut]
    plain = Conv(middle.in_channels, middle.out_channels, (3, 3), (1, 1), (1, 1))
    return middle == plain and all(one == Conv(one.in_channels, one.out_channels, (1, 1)) for one in points)


def plan_problem(problem: Problem) -> list[int]:
    """A block in the order of csrc/cuda/block_plan.h's BlockProblem."""
    block = problem.block()
    assert block is not None
    n, c, h, w = problem.shape
    main = block.main
    projected = block.shortcut is not None
    return [n, h, w, c, main[0].out_channels, main[-1].out_channels, int(projected), ELEMENTS[problem.types.source]]


def pack(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Weights and biases of a bottleneck as its kernel reads them.

    Args:
        weights: (out_channels, in_channels, kh, kw) of each layer, the shortcut's first, if there is one.
        biases: (out_channels,) each.

    Returns:
        All weights' fragments in the order in which they are multiplied, and the biases in float32 in the order of lanes.
    """
    weights, biases = tuple(w.detach() for w in weights), tuple(b.detach().float() for b in biases)
    first, middle, last = weights[-3:]
    inner, out = middle.shape[0], last.shape[0]
    fragments = [_fragments(_as_loaded(first.flatten(1)))]
    # k of the 3×3 layer: its taps, and channels in order.
    fragments.append(_fragments(middle.permute(0, 2, 3, 1).reshape(inner, -1)))
    # Of the last layer groups of channels with all of their k, the shortcut's first, one group after the other.
    projected = len(weights) == 4
    columns = 2 if projected else 4
    products = [_as_loaded(weights[0].flatten(1))] if projected else []
    products = [_fragments(_in_neighbours(matrix, columns)) for matrix in (*products, last.flatten(1))]
    groups = [product.view(product.shape[0], out // (8 * columns), -1) for product in products]
    fragments.append(torch.cat(groups).transpose(0, 1))
    own = [_by_lane(bias, 1) for bias in biases[-3:-1]] + [_by_lane(bias, columns) for bias in (biases[-1], *biases[:-3])]
    return torch.cat([part.flatten() for part in fragments]), torch.cat(own).contiguous()


def _fragments(matrix: Tensor) -> Tensor:
    """A (channels, k) matrix as ldmatrix reads it: (k / 16, channels / 16, 2 × 8 channels of 2 × 8 k, by eights)."""
    channels, k = matrix.shape
    return matrix.view(channels // 16, 2, 8, k // 16, 2, 8).permute(3, 0, 1, 4, 2, 5).reshape(k // 16, channels // 16, -1)


def _as_loaded(matrix: Tensor) -> Tensor:
    """A (channels, k) matrix with k in fragments' order: of each 32, a lane loads 8 neighbours: (2 steps, 2, 4 lanes, 2)."""
    channels, k = matrix.shape
    return matrix.view(channels, k // 32, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(channels, k)


def _in_neighbours(matrix: Tensor, columns: int) -> Tensor:
    """A (channels, k) matrix with channels so that a lane has neighbours of the result: in groups of (columns, 4 lanes, 2)."""
    channels, k = matrix.shape
    return matrix.view(-1, 4, columns, 2, k).transpose(1, 2).reshape(channels, k)


def _by_lane(bias: Tensor, columns: int) -> Tensor:
    """A bias as lanes load it, two columns at once: (columns / 2, 4 lanes, 2, 2). `columns` as above; 1: channels in order."""
    if columns == 1:
        return bias.view(-1, 2, 4, 2).transpose(1, 2).flatten()
    return bias.view(-1, 4, columns // 2, 4).transpose(1, 2).flatten()
