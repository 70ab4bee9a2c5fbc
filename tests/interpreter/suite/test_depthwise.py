"""Depthwise convolutions on the Triton kernels: values, edges and every function of the epilogue."""

import dataclasses

import pytest
import torch
from support.activations import FUNCTIONS, check_function, epilogue_of, special_operands
from support.triton_problems import Case, check, fused, stock

from resnet_fused import backends
from resnet_fused.backends.problem import RESIDUAL, Step, X
from resnet_fused.backends.triton import conv2d_depthwise
from resnet_fused.backends.triton.configs import Chip

F16, BF16 = torch.float16, torch.bfloat16
CPU_CHIP = Chip.of(torch.device("cpu"))
RAGGED = Case("odd sizes, and a last program that isn't full", (2, 24, 7, 9), 24, (3, 3), padding=(1, 1), groups=24)

CASES = {
    "3x3": RAGGED,
    "3x3-f16": RAGGED.with_(dtype=F16),
    "3x3-bf16": RAGGED.with_(dtype=BF16),
    "no-residual": RAGGED.with_(op="conv2d_bn_relu"),
    "stride": RAGGED.with_(why="the first of a stage", stride=(2, 2), dtype=F16),
    "5x5": RAGGED.with_(kernel=(5, 5), padding=(2, 2), dtype=F16),
    "5x5-stride": RAGGED.with_(kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    "7x7": Case("ConvNeXt", (1, 32, 8, 5), 32, (7, 7), padding=(3, 3), groups=32, op="conv2d_bn", dtype=F16),
    "uneven": RAGGED.with_(why="height and width differ everywhere", kernel=(3, 2), stride=(2, 1), padding=(0, 2)),
    "padded-far": RAGGED.with_(why="windows without a pixel", padding=(4, 5)),
    "odd-channels": Case("channels that nothing divides", (1, 19, 5, 5), 19, (3, 3), padding=(1, 1), groups=19, dtype=F16),
    "multiplier": Case("three results of a channel", (2, 8, 6, 5), 24, (3, 3), padding=(1, 1), groups=8),
    "one-pixel": Case("the end of a network on small images", (1, 40, 1, 1), 40, (3, 3), padding=(1, 1), groups=40),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_is_as_exact_as_stock(case):
    tensors = case.tensors()
    y = fused(case, *tensors)
    check(case, y, tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("strip", conv2d_depthwise.STRIPS, ids=lambda strip: strip.name)
def test_every_strip_gives_the_same_result(strip, stride, monkeypatch):
    case = RAGGED.with_(stride=(stride, stride), dtype=F16)
    tensors, used = case.tensors(), []
    launch = conv2d_depthwise.launch
    monkeypatch.setattr(conv2d_depthwise, "launch", lambda *args: used.append(args[1]) or launch(*args))
    # Which strips are worth a measurement depends on the chip.
    monkeypatch.setattr(conv2d_depthwise, "_HOPELESS", float("inf"))
    y = backends.get("triton").prepare(case.problem, case.folded(), strip.name)(tensors[0], tensors[3])
    assert used == [strip]
    check(case, y, tensors)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.value)
def test_every_function(function):
    case = Case("two images, of which one has special sums", (2, 24, 4, 4), 24, (3, 3), padding=(1, 1), groups=24, dtype=F16)
    epilogue = epilogue_of(function)
    problem = dataclasses.replace(case.problem, steps=(Step(case.problem.conv, epilogue, (X, RESIDUAL)),))
    x, weight, bias, residual = case.tensors()
    special_operands(x, bias, residual)
    parameters = backends.ConvParameters((weight,), (bias,))
    y = backends.get("triton").prepare(problem, parameters)(x, residual)
    bare = case.with_(op="conv2d_bn")
    sums = stock(bare, x, weight, bias, residual) + residual
    exact = stock(bare, *(t.double() for t in (x, weight, bias, residual))) + residual.double()
    check_function(y, sums, exact, epilogue)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus-inf"])
def test_nan_and_inf_go_where_stock_has_them(value):
    case = RAGGED.with_(dtype=F16)
    x, weight, bias, residual = case.tensors()
    x[0, 1, 2, 4] = x[-1, 2, -1, 1] = value
    residual[0, 0, 1, 1] = value
    y, expected = fused(case, x, weight, bias, residual), stock(case, x, weight, bias, residual)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("size", [3, 5])
def test_64_bit_offsets_give_the_same_result(size):
    case = RAGGED.with_(kernel=(size, size), padding=(size // 2, size // 2))
    x, weight, bias, residual = tensors = case.tensors()
    launch = conv2d_depthwise.launch(case.problem, conv2d_depthwise.plans(case.problem, CPU_CHIP)[0])
    assert not launch.constants["WIDE"]
    y = torch.empty_like(residual)
    wide = dataclasses.replace(launch, constants={**launch.constants, "WIDE": True})
    wide.bind()(x, conv2d_depthwise.pack(weight), bias, residual, y)
    check(case, y, tensors)


def test_offsets_have_64_bits_where_a_tensor_needs_them():
    for images, wide in ((2**15, True), (2**15 - 1, False)):
        problem = RAGGED.with_(shape=(images, 64, 32, 32), k=64, groups=64).problem
        assert conv2d_depthwise.launch(problem, conv2d_depthwise.STRIPS[0]).constants["WIDE"] is wide


@pytest.mark.parametrize(
    "change",
    [{"dilation": (2, 2)}, {"kernel": (9, 9)}, {"groups": 12}, {"op": "conv2d_bn_relu", "groups": 1}],
    ids=["dilation", "9x9", "two-channels-a-group", "one-group"],
)
def test_others_are_left_to_the_implicit_matrix_product(change):
    problem = RAGGED.with_(**change).problem
    assert conv2d_depthwise.why_not(problem)
    names = backends.get("triton").plans(problem)
    assert names
    assert not any(name.startswith("depthwise") for name in names)


def test_the_implicit_matrix_product_stays_a_candidate():
    tensors = RAGGED.tensors()
    names = backends.get("triton").plans(RAGGED.problem)
    assert names[0].startswith("depthwise")
    other = next(name for name in names if not name.startswith("depthwise"))
    y = backends.get("triton").prepare(RAGGED.problem, RAGGED.folded(), other)(tensors[0], tensors[3])
    check(RAGGED, y, tensors)


def test_more_pixels_a_thread_where_there_are_enough():
    a100 = Chip("cuda", 80, 108, 163 << 10)
    few = RAGGED.with_(shape=(1, 960, 7, 7), k=960, groups=960, dtype=F16).problem
    many = RAGGED.with_(shape=(64, 96, 56, 56), k=96, groups=96, dtype=F16).problem
    assert conv2d_depthwise.plans(few, a100)[0].columns == 1
    assert conv2d_depthwise.plans(many, a100)[0].columns * conv2d_depthwise.plans(many, a100)[0].rows == 4
