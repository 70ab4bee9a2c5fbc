"""Batch norm's passes and add_relu, executed from their PTX, against float64; and their memory traffic."""

from __future__ import annotations

import pytest
import torch
from support.emulated_cuda import T4, Norm, add_relu
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused.backends.reference.batch_norm import StockPasses

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5
SHAPES = {
    "one_block": ((2, 64, 5, 7), F16),
    "several_blocks": ((2, 24, 40, 40), BF16),
    "float32": ((2, 40, 9, 7), F32),
    "odd_channels": ((2, 31, 5, 7), F16),
    "one_channel": ((3, 1, 17, 9), F32),
    "more_channels_than_threads": ((1, 264, 2, 2), F32),
}


def parameters(c: int) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(c), torch.randn(c)
    weight[0] = 0
    return weight, bias


@pytest.mark.parametrize("name", SHAPES)
def test_forward(name: str) -> None:
    shape, dtype = SHAPES[name]
    x, residual = torch.randn(shape).to(dtype) * 3 + 1, torch.randn(shape).to(dtype)
    weight, bias = parameters(shape[1])
    norm, stock = Norm(), StockPasses()
    mean, var = norm.statistics(x)
    true_mean, true_var = stock.statistics(x.double())
    for ours, theirs, truth in zip((mean, var), stock.statistics(x), (true_mean, true_var), strict=True):
        assert_as_good_as_stock(ours, theirs, truth)
    for extra, relu in ((None, False), (residual, True)):
        ours = norm.apply(x, extra, mean, var, weight, bias, EPS, relu)
        truth_args = [None if t is None else t.double() for t in (x, extra, true_mean, true_var, weight, bias)]
        assert_as_good_as_stock(
            ours, stock.apply(x, extra, mean, var, weight, bias, EPS, relu), stock.apply(*truth_args, EPS, relu)
        )
        assert norm.counters[0].kernel.endswith("_scalar") == (name in ("odd_channels", "one_channel"))


def test_statistics_of_a_large_mean() -> None:
    x = torch.randn(4, 8, 15, 17) + 1000
    mean, var = Norm().statistics(x)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((mean - true_mean).abs() / true_mean).max() < 1e-6
    assert ((var - true_var).abs() / true_var).max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", [True, False], ids=["batch_statistics", "constant_statistics"])
def test_backward(name: str, batch: bool) -> None:
    shape, dtype = SHAPES[name]
    x, dy = torch.randn(shape).to(dtype) * 2 + 1, torch.randn(shape).to(dtype)
    weight, bias = parameters(shape[1])
    norm, stock = Norm(), StockPasses()
    mean, var = stock.statistics(x)
    y = stock.apply(x, None, mean, var, weight, bias, EPS, True)

    dweight, dbias, masked = norm.backward_reduce(dy, x, y, mean, var, EPS, True)
    theirs = stock.backward_reduce(dy, x, y, mean, var, EPS, True)
    wide = [t.double() for t in (dy, x, y, mean, var)]
    truth = stock.backward_reduce(*wide, EPS, True)
    assert torch.equal(masked, theirs[2])
    assert_as_good_as_stock(dweight, theirs[0], truth[0])
    assert_as_good_as_stock(dbias, theirs[1], truth[1])

    count = float(x.numel() // shape[1])
    sums = (dweight, dbias, count) if batch else None
    dx, kept = norm.backward_apply(dy, x, y, mean, var, weight, sums, EPS, True)
    assert torch.equal(kept, masked)
    wide_sums = (truth[0], truth[1], count) if batch else None
    expected = stock.backward_apply(*wide, weight.double(), wide_sums, EPS, False)[0]
    assert_as_good_as_stock(dx, stock.backward_apply(dy, x, y, mean, var, weight, sums, EPS, False)[0], expected)


def test_nan_stays() -> None:
    x = torch.randn(2, 8, 3, 5).half()
    x[0, 2, 1, 1] = torch.nan
    norm, (weight, bias) = Norm(), parameters(8)
    mean, var = norm.statistics(x)
    assert mean.isnan().nonzero().tolist() == var.isnan().nonzero().tolist() == [[2]]
    y = norm.apply(x, None, mean, var, weight, bias, EPS, True)
    assert torch.equal(y.isnan(), (torch.arange(8) == 2).view(1, -1, 1, 1).expand_as(y))
    dy, y = torch.ones(2, 8, 3, 5).half(), torch.zeros(2, 8, 3, 5).half()
    y[0, 1, 0, 0] = torch.nan
    dbias = norm.backward_reduce(dy, y.clone(), y, torch.zeros(8), torch.ones(8), EPS, False)[1]
    assert dbias.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]  # as stock: the gradient passes where y is NaN


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 4099], ids=["one", "tail_only", "whole", "many_and_tail"])
def test_add_relu(dtype: torch.dtype, count: int) -> None:
    x, residual = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    x[0] = torch.nan
    result = add_relu(x, residual)
    assert_as_good_as_stock(result.y, (x + residual).relu(), (x.double() + residual.double()).relu())


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_add_relu_backward(dtype: torch.dtype) -> None:
    dy, y = torch.randn(4099).to(dtype), torch.randn(4099).relu().to(dtype)
    y[1], y[-1] = torch.nan, torch.nan
    result = add_relu(dy, y, backward=True)
    assert torch.equal(result.y, torch.ops.aten.threshold_backward(dy, y, 0))


def test_add_relu_on_sm75() -> None:
    x, residual = torch.randn(99).half(), torch.randn(99).half()
    assert torch.equal(add_relu(x, residual, T4).y, (x.float() + residual.float()).relu().half())


def test_one_pass_of_whole_sectors() -> None:
    shape, norm = (2, 64, 16, 16), Norm()
    x, dy = torch.randn(shape).half(), torch.randn(shape).half()
    size, by_channel = x.numel() * 2, 64 * 4
    mean, var = norm.statistics(x)
    weight, bias = parameters(64)
    assert norm.counters[0].bytes_read == size
    y = norm.apply(x, dy, mean, var, weight, bias, EPS, True)
    assert norm.counters[0].bytes_read == 2 * size + 4 * by_channel
    activations = [line for (_, kind), line in norm.counters[0].lines.items() if ".v4." in line.instruction]
    assert sum(line.traffic.bytes for line in activations) == 3 * size  # x, residual and y, once each
    assert all(line.traffic.factor == 1.0 for line in activations)
    norm.backward_apply(dy, x, y, mean, var, weight, (mean, var, 512.0), EPS, True)
    activations = [line for (_, kind), line in norm.counters[0].lines.items() if ".v4." in line.instruction]
    assert sum(line.traffic.bytes for line in activations) == 5 * size  # dy, y and x in; dx and the masked gradient out
    assert all(line.traffic.factor == 1.0 for line in activations)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_a_pass_after_a_convolution(dtype: torch.dtype, residual: bool) -> None:
    """Shift, residual and ReLU as a batch norm of mean 0 and variance 1: NaN and overflow as stock's, 16 bytes at a time."""
    shape, norm = (2, 64, 8, 8), Norm()
    x, shift = torch.randn(shape).to(dtype), torch.randn(64)
    added = torch.randn(shape).to(dtype) if residual else None
    largest = torch.finfo(dtype).max
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, largest, -largest)):
        x[1, 3, 2, i] = value
    shift[3] = largest / 2
    y = norm.apply(x, added, torch.zeros(64), torch.ones(64), None, shift, 0.0, True)
    stock = x + shift.to(dtype).view(1, -1, 1, 1) + (0 if added is None else added)
    assert torch.equal(y.isnan(), stock.relu().isnan())
    assert torch.equal(y.isinf(), stock.relu().isinf())
    finite = stock.isfinite()
    truth = x.double() + shift.view(1, -1, 1, 1).double() + (0 if added is None else added.double())
    assert_as_good_as_stock(y[finite], stock.relu()[finite], truth.relu()[finite])
    activations = [line for (_, kind), line in norm.counters[0].lines.items() if ".v4." in line.instruction]
    assert sum(line.traffic.bytes for line in activations) == (3 if residual else 2) * x.numel() * dtype.itemsize
    assert all(line.traffic.factor == 1.0 for line in activations)
