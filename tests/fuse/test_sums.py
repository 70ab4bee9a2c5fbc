"""Sums in every spelling: which of them rf.fuse takes for a residual block's, and which keep their own meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import report, rows
from torch import nn

import resnet_fused as rf


class Residual(nn.Module):
    """relu(bn(conv(x)) + x), the sum written in one of the ways that people write it."""

    def __init__(self, add):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.add = add

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.add(y, x)


def _iadd(y, x):
    y += x
    return F.relu(y)


SUMS = {
    "operator": lambda y, x: F.relu(y + x),
    "reversed": lambda y, x: (x + y).relu(),
    "in-place": _iadd,
    "torch.add": lambda y, x: torch.relu(torch.add(y, x)),
    "method": lambda y, x: y.add_(x).relu_(),
}


@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS)
def test_sums_in_every_spelling_make_a_block(add, trained):
    model = trained(Residual(add))
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert {row.op for row in rows(fused)} == {"basic_block"}
    assert report(fused).calls_fused == 1


def test_block_with_a_hook_keeps_its_forward_and_its_hook(trained):
    model = trained(nn.Sequential(Residual(SUMS["operator"])))
    calls = []
    model[0].register_forward_hook(lambda m, args, y: calls.append(len(args)))
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls == [1, 1]
    assert type(fused[0]) is Residual
    # The hook sees the block's call, and so the block is served by itself.
    assert [(row.op, row.path) for row in rows(fused)] == 2 * [("basic_block", "0")]


def _overwrites_input(y, x):
    x += y
    return F.relu(x)


NOT_SUMS = {
    "scaled": lambda y, x: F.relu(torch.add(y, x, alpha=2)),
    "with-itself": lambda y, x: F.relu(y + y),
    "read-again-before-relu": lambda y, x: (lambda s: F.relu(s) + s)(y + x),
    "bn-read-again": lambda y, x: F.relu(y + x) + y,
    "writes-into-the-input": _overwrites_input,
    "input-overwritten-between": lambda y, x: F.relu(y + x.mul_(2)),
}


@pytest.mark.parametrize("add", NOT_SUMS.values(), ids=NOT_SUMS)
def test_sums_that_are_not_residuals_keep_their_meaning(add, trained):
    model = trained(Residual(add))
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 6, 6)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        got, want = fused(a), model(b)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()
        assert (got.data_ptr() == a.data_ptr()) == (want.data_ptr() == b.data_ptr())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg="what happens to the input differs from stock")


class Projected(nn.Module):
    """A block whose paths may differ in size, by the padding of its main path."""

    def __init__(self, padding):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=padding), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=padding), nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


@pytest.mark.parametrize("precision", ["fast", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_paths_of_different_sizes_are_refused_as_by_stock(channels_last, dtype, precision, trained):
    model = trained(Projected(0)).to(dtype)
    fused = rf.fuse(model, precision=precision)
    x = torch.randn(1, 16, 9, 8, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size") as ours:
            fused(x)
        with torch.no_grad(), pytest.raises(RuntimeError) as stocks:
            model(x)
        assert str(ours.value) == str(stocks.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_of_one_pixel_is_broadcast_as_by_stock(dtype, trained):
    model = trained(Projected(0)).to(dtype)
    fused = rf.fuse(model)
    x = torch.randn(1, 16, 5, 5, dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)
