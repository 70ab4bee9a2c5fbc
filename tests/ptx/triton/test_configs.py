"""The choice among the tiles: what the model must get right without timing anything."""

import math

import pytest
import torch
from support.triton_aot import CHIPS, problem

from resnet_fused.backends.triton import configs

ARCHS = pytest.mark.parametrize("arch", CHIPS, ids=str)


def programs(posed, plan):
    n, k, oh, ow = posed.output_shape()
    return math.ceil(n * oh * ow / plan.tile.m) * math.ceil(k / plan.tile.n) * plan.splits


@ARCHS
@pytest.mark.parametrize(
    ("shape", "k", "size"),
    [
        pytest.param((1, 512, 7, 7), 512, 3, id="res5-batch-1"),
        pytest.param((1, 256, 14, 14), 256, 3, id="res4-batch-1"),
        pytest.param((64, 64, 56, 56), 64, 3, id="res2-batch-64"),
        pytest.param((1, 3, 224, 224), 64, 7, id="stem"),
        pytest.param((1, 2, 1, 1), 3, 1, id="tiny"),
    ],
)
def test_there_is_a_plan_for_everything_and_all_fit_the_chip(arch, shape, k, size):
    posed = problem("conv2d_bn_add_relu", shape, k, size)
    plans = configs.plans(posed, CHIPS[arch], False)
    assert plans
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        assert plan.tile.shared_bytes(CHIPS[arch], 2) * plan.block_k // plan.tile.k <= CHIPS[arch].shared_limit


@ARCHS
def test_few_pixels_are_split_over_the_reduction_until_half_the_chip_works(arch):
    posed = problem("conv2d_bn_relu", (1, 512, 7, 7), 512, 3)
    best = configs.plans(posed, CHIPS[arch], False)[0]
    assert best.splits > 1
    assert programs(posed, best) >= CHIPS[arch].multiprocessors / 2


@ARCHS
def test_many_pixels_are_not_split_and_narrow_results_get_narrow_tiles(arch):
    posed = problem("conv2d_bn_relu", (64, 64, 56, 56), 64, 3)
    best = configs.plans(posed, CHIPS[arch], False)[0]
    assert best.splits == 1
    assert best.tile.n <= 64


def test_few_channels_are_walked_by_filter_rows():
    walks = {
        (3, 7, 1): configs.ROWS,
        (4, 3, 32): configs.ROWS,
        (1, 3, 1): configs.ROWS,
        (64, 3, 1): configs.TAPS,
        (64, 1, 1): configs.POINTWISE,
    }
    for (channels, size, groups), walk in walks.items():
        posed = problem("conv2d_bn", (1, channels * groups, 9, 9), 32, size, groups=groups)
        assert configs.walk_of(posed) == walk


def test_rows_go_in_pairs_where_that_aligns_them():
    walks = {
        (3, 7, 2, 224): configs.PAIRS,
        (3, 3, 2, 224): configs.PAIRS,
        (1, 7, 2, 224): configs.PAIRS,
        (3, 7, 2, 30): configs.ROWS,  # a row of the image has 90 elements
        (3, 3, 1, 32): configs.ROWS,  # two pixels of stride 1 are 6 elements
        (4, 7, 2, 224): configs.ROWS,  # aligned as it is
    }
    for (channels, size, stride, width), walk in walks.items():
        assert configs.walk_of(problem("conv2d_bn_relu", (1, channels, 32, width), 64, size, stride)) == walk


def test_tf32_is_only_used_where_it_is_allowed():
    posed = problem("conv2d_bn", (8, 64, 28, 28), 64, 3, dtype=torch.float32)
    assert {plan.tile for plan in configs.plans(posed, CHIPS[80], True)} <= set(configs.TF32)
    assert {plan.tile for plan in configs.plans(posed, CHIPS[80], False)} <= set(configs.FMA)
    assert {plan.tile for plan in configs.plans(posed, CHIPS[75], True)} <= set(configs.FMA)
    # AMD's matrix unit has products of float32 themselves.
    assert {plan.tile for plan in configs.plans(posed, CHIPS["gfx942"], False)} <= set(configs.TF32)
