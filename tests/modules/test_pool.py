"""The average pool of a fused model: as good as nn.AdaptiveAvgPool2d(1), and that module wherever it can't be more."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import assert_as_good_as_stock
from torch import nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.modules.pool import FusedGlobalAvgPool2d

needs_kernels = pytest.mark.skipif(
    backends.get("cpu").unavailable() is not None, reason=f"cpu backend: {backends.get('cpu').unavailable()}"
)
channels_last = torch.channels_last


def pool_of(size: object = 1) -> nn.Module:
    return rf.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(size)).eval())[3]


@pytest.fixture
def stock_calls(monkeypatch) -> list[torch.Tensor]:
    """The inputs that stock's pool was called with."""
    called = []
    forward = nn.AdaptiveAvgPool2d.forward
    monkeypatch.setattr(nn.AdaptiveAvgPool2d, "forward", lambda self, x: called.append(x) or forward(self, x))
    return called


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 7, 7), (3, 100, 5, 9), (2, 1, 3, 3), (2, 129, 1, 2), (1, 17, 40, 33)])
@torch.no_grad()
def test_the_mean_is_as_good_as_stocks(dtype, shape, stock_calls):
    x = (torch.randn(shape) + 3).to(dtype).contiguous(memory_format=channels_last)
    want = nn.functional.adaptive_avg_pool2d(x, 1)
    got = pool_of()(x)
    assert not stock_calls
    assert_as_good_as_stock(got, want, x.double().mean((2, 3), keepdim=True))
    assert got.stride() == want.stride()


@needs_kernels
@torch.no_grad()
def test_nan_and_infinity_stay_in_their_channel():
    x = torch.randn(2, 40, 3, 3).contiguous(memory_format=channels_last)
    x[0, 3, 1, 1], x[1, 39, 2, 2] = float("nan"), float("inf")
    torch.testing.assert_close(pool_of()(x), nn.functional.adaptive_avg_pool2d(x, 1), equal_nan=True)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(2, 8, 4, 4), id="contiguous"),
        pytest.param(torch.randn(2, 8, 4, 4).double().contiguous(memory_format=channels_last), id="float64"),
        pytest.param(torch.randn(8, 4, 4), id="no batch"),
        pytest.param(torch.randn(2, 8, 1, 1), id="one pixel"),
        pytest.param(torch.randn(0, 8, 4, 4).contiguous(memory_format=channels_last), id="empty"),
        pytest.param(torch.randn(2, 8, 8, 4).contiguous(memory_format=channels_last)[:, :, ::2], id="strided"),
    ],
)
@torch.no_grad()
def test_other_inputs_go_to_stock(x, stock_calls):
    assert torch.equal(pool_of()(x), nn.functional.adaptive_avg_pool2d(x, 1))
    assert len(stock_calls) == 1


def test_derivatives_autocast_and_other_backends_go_to_stock(stock_calls):
    pool, x = pool_of(), torch.randn(2, 8, 4, 4).contiguous(memory_format=channels_last).requires_grad_()
    pool(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pool(x)
    with torch.no_grad(), rf.use_backend("reference"):
        pool(x)
    assert len(stock_calls) == 3


@pytest.mark.parametrize("size", [(1, 1), [1, 1], 1])
def test_a_pool_to_one_pixel_is_taken_over_with_its_hooks(size):
    pool = nn.AdaptiveAvgPool2d(size)
    seen = []
    pool.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), pool).eval()
    fused = rf.fuse(model)
    assert type(fused[3]) is FusedGlobalAvgPool2d
    assert type(copy.deepcopy(fused)[3]) is FusedGlobalAvgPool2d
    assert type(pool) is nn.AdaptiveAvgPool2d
    with torch.no_grad():
        fused(torch.randn(1, 3, 6, 6))
    assert seen == [(1, 8, 1, 1)]


@pytest.mark.parametrize("size", [2, (1, None), (1, 2)])
def test_other_pools_are_left_alone(size):
    assert type(pool_of(size)) is nn.AdaptiveAvgPool2d


@torch.no_grad()
def test_a_size_that_was_changed_since_is_stocks():
    pool, x = pool_of(), torch.randn(2, 8, 4, 4).contiguous(memory_format=channels_last)
    pool(x)
    pool.output_size = 2
    assert pool(x).shape == (2, 8, 2, 2)
