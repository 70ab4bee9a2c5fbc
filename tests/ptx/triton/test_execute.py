"""The compiled sm_80 kernels, run instruction by instruction on the CPU: results, memory traffic and bank conflicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ptx_executor as px
import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock
from support.triton_aot import CHIPS, plan, problem, target
from torch import Tensor

from resnet_fused.backends.problem import Problem
from resnet_fused.backends.tf32 import to_tf32
from resnet_fused.backends.triton import conv2d, elementwise
from resnet_fused.backends.triton.configs import HALF, TF32, Plan, Tile
from resnet_fused.backends.triton.prepare import module_of, pack

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
LOOP_KINDS = ("cp_async_shared", "ldmatrix", "shared_load")


def tile(m: int, n: int, k: int, table: tuple[Tile, ...] = HALF) -> Tile:
    return next(tile for tile in table if (tile.m, tile.n, tile.k) == (m, n, k))


@dataclass(frozen=True)
class Run:
    """One problem on one plan; `why` says what it is there for."""

    why: str
    problem: Problem
    plan: Plan
    sectors: float = 1.05


def case(
    why: str, chosen: Tile, splits: int = 1, sectors: float = 1.05, op: str = "conv2d_bn_add_relu", **geometry: Any
) -> Run:
    conv = problem(op, **geometry)
    return Run(why, conv, plan(chosen, conv, splits), sectors)


RUNS = {
    "taps": case("the work horse", tile(128, 128, 32), shape=(1, 64, 14, 14), k=128, size=3),
    "taps-stride": case("first 3×3 of a stage", tile(128, 64, 32), shape=(1, 64, 18, 18), k=64, size=3, stride=2),
    "taps-bf16": case("bfloat16", tile(128, 64, 32), shape=(1, 32, 12, 12), k=64, size=3, dtype=BF16),
    "taps-wide": case("the widest tile", tile(128, 256, 64), shape=(1, 64, 12, 12), k=256, size=3),
    "taps-small": case("7×7 images", tile(64, 64, 64), shape=(2, 64, 7, 7), k=64, size=3),
    "taps-tf32": case("TF32", tile(64, 64, 32, TF32), shape=(1, 32, 8, 8), k=64, size=3, dtype=F32),
    "pointwise": case("1×1, the end of a bottleneck", tile(128, 128, 32), shape=(1, 64, 14, 14), k=256, size=1),
    "pointwise-stride": case(
        "projection shortcut", tile(128, 64, 32), op="conv2d_bn", shape=(1, 64, 16, 16), k=64, size=1, stride=2
    ),
    "split": case("the reduction in four parts", tile(32, 64, 64), splits=4, shape=(1, 128, 7, 7), k=64, size=3),
    "stem": case("three channels", tile(128, 64, 32), op="conv2d_bn_relu", shape=(1, 3, 24, 24), k=64, size=7, stride=2),
    "stem-add": case("the same with a residual", tile(64, 64, 64), shape=(1, 3, 16, 16), k=64, size=7, stride=2, dtype=BF16),
    "stem-tf32": case("TF32", tile(64, 64, 32, TF32), shape=(1, 3, 12, 12), k=64, size=7, stride=2, dtype=F32),
    "stem-deep": case("the first of three 3×3", tile(64, 64, 64), shape=(1, 3, 24, 24), k=32, size=3, stride=2),
    # Its rows of 66 bytes let nothing be aligned: each window's row is 42 bytes that start anywhere.
    "stem-odd-width": case(
        "three channels", tile(64, 64, 64), sectors=1.3, op="conv2d_bn_relu", shape=(1, 3, 11, 11), k=64, size=7, stride=2
    ),
    "grouped": case("ResNeXt", tile(128, 16, 64), shape=(1, 32, 10, 10), k=32, size=3, groups=2),
    "ragged": case("nothing fills a tile", tile(64, 64, 64), shape=(1, 72, 5, 5), k=40, size=3),
}


def execute(run: Run) -> tuple[Tensor, Tensor, Tensor, list[px.Counters]]:
    """The kernels' result, float64's, stock's, and the counters of each launch.

    In TF32, which a CPU doesn't have, the latter two are of operands rounded to it.
    """
    (conv,) = run.problem.convs
    dtype = run.problem.dtype
    generator = torch.Generator().manual_seed(11)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shapes = run.problem.shape, run.problem.output_shape()
    x, residual = (random(shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
    weight_shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
    weight = random(weight_shape) / math.prod(weight_shape[1:]) ** 0.5
    bias = random((conv.out_channels,))
    added = residual if run.problem.epilogue.residual else None

    chip, tf32 = CHIPS[80], dtype == F32
    main, finish = module_of(run.plan).launches(run.problem, run.plan, chip, tf32)
    packed = pack(weight, conv, run.plan, chip.precision(tf32))
    y = torch.empty_like(residual)
    pixels = (y.permute(0, 2, 3, 1), None if added is None else added.permute(0, 2, 3, 1))
    counters = []
    if finish is None:
        arguments = [x.permute(0, 2, 3, 1), packed, bias, pixels[1], px.Output(pixels[0])]
        counters.append(launch(main, arguments))
    else:
        partial = torch.empty((main.grid[1], y.numel()), dtype=F32)
        counters.append(launch(main, [x.permute(0, 2, 3, 1), packed, bias, None, px.Output(partial)]))
        counters.append(launch(finish, [partial, bias, pixels[1], px.Output(pixels[0])]))

    def stock(to: Any) -> Tensor:
        operands = (to_tf32(x), to_tf32(weight)) if dtype == F32 else (x, weight)
        result = F.conv2d(*map(to, operands), to(bias), conv.stride, conv.padding, conv.dilation, conv.groups)
        result = result if added is None else result + to(added)
        return result.relu() if run.problem.epilogue.relu else result

    return y, stock(Tensor.double), stock(lambda t: t), counters


def launch(kernel: Any, tensors: list[Any]) -> px.Counters:
    arguments = [t for t in tensors if t is not None]
    return px.launch_triton(kernel.compile(target(80)), kernel.grid, [*arguments, *kernel.scalars])


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in RUNS.items()])
def test_compiled_convolution(run):
    y, truth, stock, counters = execute(run)
    assert_as_good_as_stock(y, stock, truth)
    for count in counters:
        assert count.global_factor <= run.sectors
        for kind in LOOP_KINDS:
            assert count.of(kind).units == count.of(kind).ideal


def test_tf32_keeps_nan_and_inf():
    """Tensor cores would make an Inf of the first NaN, and adding to the second one to round it a zero."""
    run = case("NaN and Inf", tile(32, 32, 32, TF32), op="conv2d_bn", shape=(1, 32, 4, 8), k=32, size=1, dtype=F32)
    (conv,) = run.problem.convs
    x = torch.ones(1, 4, 8, 32)
    x.view(torch.int32)[0, 0, :3, 0] = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F800000])
    weight = torch.ones(32, 32, 1, 1)
    weight.view(torch.int32)[:2, 0, 0, 0] = torch.tensor([0x7F800001, 0x7FFFFFFF])
    main, _ = conv2d.launches(run.problem, run.plan, CHIPS[80], True)
    y = torch.empty(1, 4, 8, 32)
    launch(main, [x, pack(weight, conv, run.plan, "tf32"), torch.zeros(32), px.Output(y)])
    expected = x.flatten(0, 2) @ weight.flatten(1).T
    torch.testing.assert_close(y.flatten(0, 2), expected, rtol=0, atol=0, equal_nan=True)


def activations(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(13)
    return [torch.randn(shape, generator=generator).to(F16) for _ in range(count)]


def test_compiled_add_relu_forward_and_backward():
    x, residual, dy = activations((3, 800), 3)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    forward = launch(elementwise.add_relu_fwd(x.numel(), F16), [x, residual, px.Output(y)])
    backward = launch(elementwise.add_relu_bwd(x.numel(), F16), [dy, y, px.Output(dx)])
    assert torch.equal(y, F.relu(x + residual))
    assert torch.equal(dx, torch.where(y > 0, dy, 0))
    assert forward.global_factor == 1.0
    assert backward.global_factor == 1.0
