"""rf.fuse_training of squeeze-and-excite: means over all pixels, and convolutions of the one pixel that they give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf

CL = torch.channels_last


class Squeezed(nn.Module):
    """A norm, and a gate by the mean over its pixels."""

    def __init__(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.bn, self.gate, self.mean = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), mean

    def forward(self, x):
        y = self.bn(x)
        gate = self.gate(self.mean(y))
        return y * gate.sigmoid(), gate


MEANS = {
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "negative dims": lambda y: torch.mean(y, (-1, -2), True),
    "without dims kept": lambda y: y.mean((2, 3))[:, :, None, None],
    "adaptive pool": lambda y: F.adaptive_avg_pool2d(y, 1),
    "rows alone": lambda y: y.mean((2,), keepdim=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS)
def test_a_gate_by_a_mean_has_stocks_strides_and_derivatives(mean, layout):
    """The second one too."""
    theirs = Squeezed(mean)
    x = torch.randn(3, 8, 5, 6).contiguous(memory_format=layout)
    found = []
    for model in (rf.fuse_training(theirs), theirs):
        given = x.clone().requires_grad_()
        y, gate = model(given)
        (dx,) = torch.autograd.grad(y.square().sum() + gate.sum(), given, create_graph=True)
        found.append((y, gate, dx, *torch.autograd.grad(dx.square().sum(), [given, model.gate.weight, model.gate.bias])))
    for ours, stocks in zip(*found, strict=True):
        torch.testing.assert_close(ours, stocks, rtol=2e-5, atol=2e-5)
    for ours, stocks in zip(found[0][:3], found[1][:3], strict=True):
        assert ours.stride() == stocks.stride()


@pytest.mark.cpu
def test_convolutions_of_one_pixel_keep_to_float32(monkeypatch):
    """As stock's do, where products of matrices may be computed in bfloat16."""
    called = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args) or linear(*args))
    ours, x = rf.fuse_training(Squeezed(MEANS["mean"])), torch.randn(3, 8, 5, 6, requires_grad=True)
    ours(x)
    assert len(called) == 1
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ours(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(called) == 1
