"""How the CPU kernels divide layers among threads, also more than this machine has: by counting, and with the same results."""

from __future__ import annotations

import pytest
import torch
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock

from resnet_fused.backends import Conv, get
from resnet_fused.backends.accuracy import inputs_of, more_inputs_of, parameters_of
from resnet_fused.backends.binding import bind
from resnet_fused.bench import roofline, scaling
from resnet_fused.bench.workloads import Workload
from resnet_fused.verification import cases as trials

pytestmark = pytest.mark.cpu


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _regions(problem):
    """Units and threads of each parallel region of a layer."""
    kernel = bind(problem, parameters_of(problem), "cpu").kernel
    inputs = *inputs_of(problem), *more_inputs_of(problem)
    kernel(*inputs)
    torch.ops.resnet_fused_cpu.begin_shares(3)
    kernel(*inputs)
    numbers = torch.ops.resnet_fused_cpu.end_shares()
    while numbers:
        units, own, *numbers = numbers
        numbers = numbers[own:]
        yield units, own


# How many regions don't divide evenly: the classifier has 32 panels, for 64 threads.
UNEVEN = {(1, 8): 0, (1, 16): 0, (8, 16): 0, (8, 32): 0, (8, 64): 1}


@pytest.mark.parametrize(("batch", "count"), UNEVEN)
@torch.no_grad()
def test_every_layer_of_a_resnet50_has_even_work_for_many_threads(batch, count, threads):
    problems = roofline.posed(Workload("resnet50", batch, "float32", (224, 224)))
    threads(count)
    uneven = 0
    for problem in problems:
        for units, own in _regions(problem):
            assert own == min(units, count)
            uneven += units < 0.85 * count * -(-units // count)
    assert uneven <= UNEVEN[batch, count]


CONVS = {
    "3x3, kept weights": (Conv(128, 128, (3, 3), (1, 1), (1, 1)), 28),
    "3x3": (Conv(256, 96, (3, 3), (1, 1), (1, 1)), 14),
    "3x3, stride 2": (Conv(64, 64, (3, 3), (2, 2), (1, 1)), 56),
    "3x3, stride 2, direct": (Conv(96, 256, (3, 3), (2, 2), (1, 1)), 15),
    "1x1": (Conv(512, 96, (1, 1)), 7),
    "1x1, stride 2": (Conv(256, 224, (1, 1), (2, 2)), 28),
}


@pytest.mark.parametrize("count", [1, 3, 16, 64])
@pytest.mark.parametrize(("conv", "size"), CONVS.values(), ids=CONVS)
@torch.no_grad()
def test_results_are_right_with_any_number_of_threads(conv, size, count, threads):
    problem = problem_of("conv2d_bn_relu", (1, conv.in_channels, size, size), torch.float32, torch.device("cpu"), (conv,))
    x, folded, _ = trials.tensors(problem)
    reference = get("reference")
    stock = reference.prepare(problem, folded)(x, None)
    truth = reference.prepare(problem.with_dtype(torch.float64), folded.to(torch.float64))(x.double(), None)
    threads(count)
    kernel = bind(problem, folded, "cpu").kernel
    got = kernel(x, None)
    assert_as_good_as_stock(got, stock, truth)
    torch.ops.resnet_fused_cpu.begin_shares(1)
    shared = kernel(x, None)
    assert torch.ops.resnet_fused_cpu.end_shares()[1] >= 1
    assert torch.equal(shared, got)
    assert torch.ops.resnet_fused_cpu.end_shares() == []


@torch.no_grad()
def test_a_divisions_numbers():
    conv = Conv(64, 64, (1, 1))
    problem = problem_of("conv2d_bn_relu", (1, 64, 56, 56), torch.float32, torch.device("cpu"), (conv,))
    (found,) = scaling.divisions(problem, [4])
    assert found.units >= 4
    assert found.unit * found.units == pytest.approx(found.total)
    assert 0 < found.balance <= 1
    twice = scaling.summary([(2, found)])
    assert (twice.units, twice.total) == (2 * found.units, pytest.approx(2 * found.total))
    assert twice.efficiency == pytest.approx(found.efficiency)
    unserved = problem_of("conv2d_bn_relu", (1, 8, 9, 9), torch.float64, torch.device("cpu"), (Conv(8, 8, (1, 1)),))
    assert scaling.divisions(unserved, [4]) is None
