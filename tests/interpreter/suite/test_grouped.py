"""Convolutions in groups on the Triton kernel that merges them: values, edges, and NaN that must stay in its group."""

import dataclasses

import pytest
import torch
from support.activations import FUNCTIONS, check_function, epilogue_of, special_operands
from support.triton_problems import Case, check, fused, stock

from resnet_fused import backends
from resnet_fused.backends.problem import RESIDUAL, Step, X
from resnet_fused.backends.triton import conv2d_grouped
from resnet_fused.backends.triton.configs import Chip

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CPU_CHIP = Chip.of(torch.device("cpu"))
NARROW = Case("ResNeXt's 32×4d, odd sizes", (2, 32, 7, 9), 32, (3, 3), padding=(1, 1), groups=8, dtype=F16)

CASES = {
    "4": NARROW,
    "no-residual": NARROW.with_(op="conv2d_bn_relu"),
    "no-relu": NARROW.with_(op="conv2d_bn"),
    "stride": NARROW.with_(why="the first of a stage", stride=(2, 2)),
    "uneven": NARROW.with_(why="height and width differ everywhere", kernel=(3, 2), stride=(2, 1), padding=(0, 2)),
    "dilation": NARROW.with_(padding=(2, 2), dilation=(2, 2)),
    "pointwise": NARROW.with_(kernel=(1, 1), padding=(0, 0)),
    "8": Case("two groups a bundle", (1, 48, 5, 6), 48, (3, 3), padding=(1, 1), groups=6, dtype=F16),
    "4-of-7": Case("a number of groups that nothing divides", (1, 28, 5, 5), 28, (3, 3), padding=(1, 1), groups=7, dtype=F16),
    "4-of-6": Case("bundles of twelve channels", (1, 24, 5, 5), 24, (3, 3), padding=(1, 1), groups=6, dtype=F16),
    "wider-results": Case("4 channels, 8 results", (1, 32, 5, 5), 64, (3, 3), padding=(1, 1), groups=8, dtype=F16),
    "fewer-results": Case("8 channels, 3 results", (1, 32, 5, 5), 12, (3, 3), padding=(1, 1), groups=4, dtype=F16),
    "24": Case("RegNet", (1, 48, 7, 7), 48, (3, 3), padding=(1, 1), groups=2, dtype=F16),
    "32": Case("ResNeSt", (1, 64, 6, 6), 64, (3, 3), padding=(1, 1), groups=2, dtype=F16),
    "64": Case("as wide as it gets", (1, 128, 4, 5), 128, (3, 3), padding=(1, 1), groups=2, dtype=F16),
    "one-pixel": Case("the end of a network on small images", (1, 32, 1, 1), 32, (3, 3), padding=(1, 1), groups=8, dtype=F16),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_is_as_exact_as_stock(case):
    assert backends.get("triton").plans(case.problem)[0].startswith("grouped")
    tensors = case.tensors()
    y = fused(case, *tensors)
    check(case, y, tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)


def tiles(case):
    return conv2d_grouped.plans(case.problem, CPU_CHIP)


@pytest.mark.parametrize("tile", tiles(NARROW), ids=lambda tile: tile.name)
def test_every_tile_gives_the_same_result(tile, monkeypatch):
    tensors, used = NARROW.tensors(), []
    launch = conv2d_grouped.launch
    monkeypatch.setattr(conv2d_grouped, "launch", lambda *args: used.append(args[1]) or launch(*args))
    y = backends.get("triton").prepare(NARROW.problem, NARROW.folded(), tile.name)(tensors[0], tensors[3])
    assert used == [tile]
    check(NARROW, y, tensors)


def test_groups_are_merged_as_far_as_they_fit_and_divide():
    expected = {"4": {4, 8}, "8": {2, 3}, "4-of-7": {1, 7}, "4-of-6": {3, 6}, "24": {1}, "32": {1}, "64": {1}}
    for name, merged in expected.items():
        assert {tile.merged for tile in tiles(CASES[name])} <= merged
        assert tiles(CASES[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("tile", tiles(NARROW), ids=lambda tile: tile.name)
def test_nan_and_inf_stay_in_their_group(tile, value):
    x, weight, bias, residual = NARROW.tensors()
    x[0, 1, 2, 4] = x[-1, 30, -1, 1] = value
    residual[0, 0, 1, 1] = value
    weight[5, 0, 0, 0] = value
    kernel = backends.get("triton").prepare(NARROW.problem, backends.ConvParameters((weight,), (bias,)), tile.name)
    y, expected = kernel(x, residual), stock(NARROW, x, weight, bias, residual)
    assert expected.isfinite().sum() > expected.numel() / 2
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    check(NARROW, y, (x, weight, bias, residual))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.value)
def test_every_function(function):
    case = Case("two images, of which one has special sums", (2, 32, 4, 4), 32, (3, 3), padding=(1, 1), groups=8, dtype=F16)
    epilogue = epilogue_of(function)
    problem = dataclasses.replace(case.problem, steps=(Step(case.problem.conv, epilogue, (X, RESIDUAL)),))
    x, weight, bias, residual = case.tensors()
    special_operands(x, bias, residual)
    y = backends.get("triton").prepare(problem, backends.ConvParameters((weight,), (bias,)))(x, residual)
    bare = case.with_(op="conv2d_bn")
    sums = stock(bare, x, weight, bias, residual) + residual
    exact = stock(bare, *(t.double() for t in (x, weight, bias, residual))) + residual.double()
    check_function(y, sums, exact, epilogue)


def test_64_bit_offsets_give_the_same_result():
    x, weight, bias, residual = tensors = NARROW.tensors()
    tile = tiles(NARROW)[0]
    launch = conv2d_grouped.launch(NARROW.problem, tile, CPU_CHIP, False)
    y = torch.empty_like(residual)
    wide = dataclasses.replace(launch, constants={**launch.constants, "WIDE": True})
    wide.bind()(x, conv2d_grouped.pack(weight, NARROW.problem.conv, tile), bias, residual, y)
    check(NARROW, y, tensors)


def test_float32_is_merged_where_tf32_is_allowed(float32_precision, monkeypatch):
    merged = []
    launch = conv2d_grouped.launch
    monkeypatch.setattr(conv2d_grouped, "launch", lambda *args: merged.append(args[1]) or launch(*args))
    case = NARROW.with_(dtype=F32)
    tensors = case.tensors()
    backend = backends.get("triton")
    float32_precision("tf32")
    kernel = backend.prepare(case.problem, case.folded())
    check(case, kernel(tensors[0], tensors[3]), tensors)
    assert len(merged) == 1
    # It isn't allowed any more: the kernel that is there multiplies float32, by the implicit matrix product.
    float32_precision("ieee")
    check(case, kernel(tensors[0], tensors[3]), tensors)
    assert len(merged) == 1
    assert not any(name.startswith("grouped") for name in backend.plans(case.problem))


@pytest.mark.parametrize(
    "change", [{"groups": 1}, {"groups": 16}, {"shape": (1, 256, 3, 3), "k": 256, "groups": 2}], ids=["one", "2", "128"]
)
def test_others_are_left_to_the_implicit_matrix_product(change):
    problem = NARROW.with_(**change).problem
    assert conv2d_grouped.why_not(problem, CPU_CHIP, False)
    names = backends.get("triton").plans(problem)
    assert names
    assert not any(name.startswith("grouped") for name in names)


def test_the_implicit_matrix_product_stays_a_candidate():
    tensors = NARROW.tensors()
    other = next(name for name in backends.get("triton").plans(NARROW.problem) if not name.startswith("grouped"))
    y = backends.get("triton").prepare(NARROW.problem, NARROW.folded(), other)(tensors[0], tensors[3])
    check(NARROW, y, tensors)
