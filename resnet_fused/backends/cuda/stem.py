"""The entry of a ResNet as a whole, in one kernel (csrc/cuda/stem.cuh): convolution, ReLU and max-pool.

How it is cut into strips, and which sizes it serves, is planned in csrc/cuda/stem_plan.cpp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel, Pool
from resnet_fused.backends.cuda import device
from resnet_fused.backends.cuda.convolution import ELEMENTS
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Activation, Conv, Epilogue, Kind, Problem

_EPILOGUE = Epilogue(activation=Activation.RELU, pool=Pool((3, 3), (2, 2), (1, 1)))


class StemWithPool(Implementation):
    """A 7×7 convolution of stride 2 from 3 to 64 channels with its pool, for compute capability 8.0 and newer."""

    name = "stem with pool"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        if problem.epilogue != _EPILOGUE:
            return "with a pool it serves convolutions with a bias, ReLU, and a max-pool of 3×3, stride 2 and padding 1"
        if problem.conv != Conv(3, problem.conv.out_channels, (7, 7), (2, 2), (3, 3)):
            return "with a pool it serves a 7×7 convolution of stride 2 and padding 3 on 3 channels"
        _, c, h, w = problem.shape
        strides = [c * h * w, 1, c * w, c]  # x is copied where its own don't suit
        try:
            torch.ops.resnet_fused_cuda.stem_plan(plan_problem(problem), strides, device.properties(problem.device), [0] * 4, 0)
        except (ValueError, RuntimeError) as error:  # the planner's reason
            return str(error).splitlines()[0]
        return None

    def plans(self, problem: Problem) -> list[str]:
        return list(_rows(problem))

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        weight = parameters.pack(("cuda", "stem", problem.dtype), lambda: pack_weight(parameters.weights[0]))
        bias = parameters.pack(("cuda", "bias"), lambda: parameters.biases[0].detach().float().contiguous().clone())
        run, rows = torch.ops.resnet_fused_cuda.stem_fwd.default, _rows(problem).get(plan or "", 0)
        return in_its_format(lambda x, residual: run(x, weight, bias, rows), problem)


def plan_problem(problem: Problem) -> list[int]:
    """A stem in the order of csrc/cuda/stem_plan.h's StemProblem."""
    n, _, h, w = problem.shape
    return [n, h, w, problem.conv.out_channels, ELEMENTS[problem.types.source]]


def _rows(problem: Problem) -> dict[str, int]:
    """How many rows of the result a strip may have, by the name of the plan."""
    found = torch.ops.resnet_fused_cuda.stem_rows(plan_problem(problem), device.properties(problem.device))
    return {f"strips_of_{rows}": rows for rows in found}


def pack_weight(weight: Tensor) -> Tensor:
    """The weight as lanes hold it: (2 warps, 21 words by fours, 32 lanes, 4 words, 2).

    Of a warp's 32 channels column j of mma has in its place n channel 8 · (n / 2) + 2 · j + n % 2, so that a lane has 8
    neighbours of the result. The 21 filter rows of all channels have 8 taps, the first of them zero, and are multiplied two
    at a time: those of one channel after the other's, then the seventh rows of all.

    Args:
        weight: (64, 3, 7, 7).
    """
    taps = F.pad(weight.detach(), (1, 0))
    rows = torch.cat([taps[:, :, :6].flatten(1, 2), taps[:, :, 6]], 1)  # (channels, 21, 8)
    # Channels as (warp, lane's upper 2 bits of place, column, lowest bit of place), taps as (lane's lower 2 bits, 2).
    rows = rows.view(2, 4, 4, 2, 21, 4, 2)
    paired = rows[:, :, :, :, :20].reshape(2, 4, 2, 2, 2, 10, 2, 4, 2)  # (warp, place, column by 2, bit, step, row, t, 2)
    paired = paired.permute(0, 5, 2, 1, 4, 7, 3, 6, 8).reshape(2, 20, 32, 4, 2)
    last = rows[:, :, :, :, 20].permute(0, 1, 3, 4, 2, 5).reshape(2, 1, 32, 4, 2)
    return torch.cat([paired, last], 1).contiguous()
