"""The backend "cpu": what it serves and how, the stem, precision, and the memory of packed weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.conv_cases import CASES, Case
from support.fast_paths import report
from support.problems import problem_of
from support.refusals import Asked, Machine, refusal
from support.tolerances import assert_as_good_as_stock

from resnet_fused.backends import Activation, Conv, ConvParameters, Epilogue, Pool, Problem, get
from resnet_fused.backends.binding import bind
from resnet_fused.backends.cpu import plan as cpu_plan
from resnet_fused.backends.cpu.block import WholeBlock
from resnet_fused.backends.cpu.stem import Stem
from resnet_fused.backends.processor import processor
from resnet_fused.fusion.fuse import fuse

CPU = torch.device("cpu")
POOL = Pool((3, 3), (2, 2), (1, 1))
STEM = {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}


def problem(op: str, shape: tuple[int, int, int, int], *convs: Conv, **more) -> Problem:
    return problem_of(op, shape, more.pop("dtype", torch.float32), CPU, convs, **more)


@pytest.mark.parametrize(
    ("n", "channels", "h", "w", "out", "pool", "dtype"),
    [
        pytest.param(2, 3, 64, 64, 64, True, torch.float32, id="image"),
        pytest.param(1, 3, 97, 131, 64, True, torch.float32, id="odd-size"),
        pytest.param(3, 3, 40, 30, 40, False, torch.float32, id="without-pool"),
        pytest.param(1, 1, 7, 5, 33, True, torch.float32, id="grey-and-tail"),
        pytest.param(1, 4, 1, 1, 16, True, torch.float32, id="one-pixel"),
        pytest.param(1, 3, 33, 20, 64, True, torch.bfloat16, id="bfloat16"),
        pytest.param(1, 3, 33, 20, 64, True, torch.float16, id="float16"),
        pytest.param(1, 3, 17, 20, 33, False, torch.float16, id="float16-without-pool"),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_stem(isa, n, channels, h, w, out, pool, dtype, channels_last):
    x = torch.randn(n, channels, h, w).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = (torch.randn(out, channels, 7, 7) / 12).to(dtype), torch.randn(out).to(dtype)
    kind = problem(
        "stem" if pool else "conv2d_bn_relu", x.shape, Conv(channels, out, **STEM), dtype=dtype, pool=POOL if pool else None
    )

    def stock(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), 2, 3).relu()
        return F.max_pool2d(y, 3, 2, 1) if pool else y

    backend = get("cpu")
    assert backend.why_not(kind) is None
    y = backend.prepare(kind, ConvParameters((weight,), (bias,)))(x, None)
    assert_as_good_as_stock(y, stock(dtype), stock(torch.float64))


def test_nan_survives_the_stems_pool(isa):
    """That of a weight; one in x is declined."""
    x = torch.randn(1, 3, 40, 40)
    weight, bias = torch.randn(32, 3, 7, 7) / 12, torch.zeros(32)
    weight[3, 1, 2, 2] = float("nan")
    kernel = get("cpu").prepare(problem("stem", x.shape, Conv(3, 32, **STEM), pool=POOL), ConvParameters((weight,), (bias,)))
    want = F.max_pool2d(F.conv2d(x, weight, bias, 2, 3).relu(), 3, 2, 1)
    assert torch.equal(kernel(x, None).isnan(), want.isnan())


def test_one_weight_served_by_winograd_and_directly(isa):
    """The two take weights in orders of their own, and a layer's input may change its size."""
    conv = Conv(160, 160, (3, 3), padding=(1, 1))
    weight, bias = torch.randn(160, 160, 3, 3) / 38, torch.randn(160)
    folded = ConvParameters((weight,), (bias,))
    for size, by_winograd in ((8, True), (3, False), (8, True)):
        x = torch.randn(1, 160, size, size).contiguous(memory_format=torch.channels_last)
        kind = problem("conv2d_bn", x.shape, conv)
        assert (cpu_plan.winograd(kind) is not None) == by_winograd
        y = get("cpu").prepare(kind, folded)(x, None)
        stock, truth = (F.conv2d(x.to(d), weight.to(d), bias.to(d), padding=1) for d in (torch.float32, torch.float64))
        assert_as_good_as_stock(y, stock, truth)


def test_exact_precision_uses_no_winograd():
    """Products of integers are exact by the direct sum, and rounded in Winograd, whose points are irrational."""
    conv = Conv(16, 16, (3, 3), padding=(1, 1))
    x = torch.randint(-8, 8, (1, 16, 12, 12)).float().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randint(-8, 8, (16, 16, 3, 3)).float(), torch.zeros(16)
    want = F.conv2d(x.double(), weight.double(), padding=1)
    result = {}
    for precision in ("direct", "fast"):
        kind = problem("conv2d_bn", x.shape, conv, precision=precision)
        result[precision] = get("cpu").prepare(kind, ConvParameters((weight,), (bias,)))(x, None)
    assert torch.equal(result["direct"].double(), want)
    assert not torch.equal(result["fast"].double(), want)
    block = problem("basic_block", x.shape, conv, conv, precision="direct")
    assert "precision='direct'" in get("cpu").why_not(block)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param(
            problem("conv2d_bn", (1, 8, 8, 8), Conv(8, 8, (5, 5), groups=2)), "of several groups, here 2", id="groups"
        ),
        pytest.param(
            problem("conv2d_bn", (1, 8, 8, 8), Conv(8, 8, (1, 1)), dtype=torch.float64), "not torch.float64", id="float64"
        ),
        pytest.param(problem("conv2d_bn", (0, 8, 8, 8), Conv(8, 8, (1, 1))), "empty", id="empty"),
        pytest.param(problem("stem", (1, 3, 8, 8), Conv(3, 8, (3, 3)), pool=POOL), "7×7", id="stem-of-3x3"),
        pytest.param(
            problem("basic_block", (1, 8, 8, 8), Conv(8, 8, (3, 3)), Conv(8, 8, (3, 3))), "padding", id="unpadded-block"
        ),
    ],
)
def test_what_it_can_not_serve_has_a_reason(kind: Problem, reason: str):
    assert reason in get("cpu").why_not(kind)


def test_float16_needs_vectors_that_convert_it(monkeypatch):
    kind = problem("conv2d_bn", (1, 8, 8, 8), Conv(8, 8, (1, 1)), dtype=torch.float16)
    assert get("cpu").why_not(kind) is None
    monkeypatch.setattr(torch.ops.resnet_fused_cpu, "float16", lambda: False)
    assert "F16C" in get("cpu").why_not(kind)


@pytest.mark.parametrize("multiplies", [True, False])
def test_float16_is_stocks_where_the_cpu_multiplies_it(monkeypatch, multiplies: bool):
    own = replace(processor(), vendor="GenuineIntel", instruction_sets=("avx512_fp16",) if multiplies else ("f16c",))
    monkeypatch.setattr("resnet_fused.backends.cpu.backend.processor", lambda: own)
    kind = problem("conv2d_bn", (1, 8, 8, 8), Conv(8, 8, (1, 1)), dtype=torch.float16)
    assert get("cpu").preferred(kind) is not multiplies


def test_a_float16_stem_leaves_functions_that_see_infinity_to_stock():
    epilogue = Epilogue(activation=Activation.SILU)
    kind = Problem.of(Conv(3, 8, **STEM), (1, 3, 8, 8), torch.float16, CPU, epilogue)
    assert "in float16 it serves ReLU or no function, not silu" in Stem().why_not(kind)


@pytest.mark.parametrize(
    ("shape", "conv", "tile"),
    [
        pytest.param((8, 64, 56, 56), Conv(64, 64, (3, 3), padding=(1, 1)), 4, id="stride-1"),
        pytest.param((8, 128, 56, 56), Conv(128, 128, (3, 3), (2, 2), (1, 1)), 5, id="stride-2"),
        pytest.param((1, 512, 14, 14), Conv(512, 512, (3, 3), (2, 2), (1, 1)), None, id="stride-2-few-pixels"),
        pytest.param((8, 20, 56, 56), Conv(20, 64, (3, 3), (2, 2), (1, 1)), None, id="stride-2-channel-tail"),
        pytest.param((8, 64, 56, 56), Conv(64, 64, (1, 1)), None, id="1x1"),
        pytest.param((8, 64, 56, 56), Conv(64, 64, (3, 3), padding=(2, 2), dilation=(2, 2)), None, id="dilated"),
    ],
)
def test_plan(shape, conv, tile):
    plan = cpu_plan.winograd(problem("conv2d_bn", shape, conv))
    assert (plan.output_tile if plan else None) == tile


@pytest.mark.parametrize(("batch", "whole"), [(1, False), (8, True)])
def test_a_chosen_backend_takes_a_block_in_one_piece_where_the_automatic_choice_does(batch, whole, monkeypatch):
    """With backend="cpu" a ResNet-18 took 2.4 times as long at batch 1 when every block that can be was one piece."""
    conv = Conv(64, 64, (3, 3), padding=(1, 1))
    block = problem("basic_block", (batch, 64, 16, 16), conv, conv)
    weights, biases = tuple(torch.randn(64, 64, 3, 3) for _ in range(2)), tuple(torch.randn(64) for _ in range(2))
    in_one_piece, make = [], WholeBlock.prepare
    monkeypatch.setattr(WholeBlock, "prepare", lambda *args: in_one_piece.append(args) or make(*args))
    for chosen in ("auto", "cpu"):
        in_one_piece.clear()
        assert bind(block, ConvParameters(weights, biases), chosen).backend == "cpu"
        assert bool(in_one_piece) == whole


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_weights_take_little_more_than_twice_the_memory(name: str, trained):
    """Plain folded and packed weights together, against the stock model's parameters and buffers."""
    stock = trained(getattr(torchvision.models, name)())
    model = fuse(stock, backend="cpu")
    model(torch.randn(1, 3, 64, 64))
    packed = report(model).packed_bytes
    plain, theirs = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (model, stock))
    assert packed > plain / 2
    assert plain + packed <= 2.2 * theirs, f"{plain / 1e6:.1f} + {packed / 1e6:.1f} MB against {theirs / 1e6:.1f} MB"


@pytest.mark.parametrize("op", ["conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refusals_are_those_of_the_table(isa: str, case: Case, op: str):
    """With each instruction set: a CPU without AVX512_BF16 is one with AVX2 alone."""
    x, weight, _ = case.tensors()
    conv = Conv.of(weight, *case.geometry)
    asked = Asked(case.id, op, case.dtype, 0 in x.shape, case.groups, case.stock_fails)
    reason, expected = (
        get("cpu").why_not(problem(op, x.shape, conv, dtype=case.dtype)),
        refusal("cpu", asked, Machine.here("cpu")),
    )
    assert reason is None if expected is None else expected in reason
