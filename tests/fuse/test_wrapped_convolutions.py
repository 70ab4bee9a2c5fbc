"""Convolutions with their norm and activation inside, as detectron2 has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.fast_paths import assert_same_model, rows
from torch import nn

import resnet_fused as rf


class Wrapped(nn.Conv2d):
    """detectron2's convolution: norm and activation inside, and a look at the batch size that can't be traced."""

    def __init__(self, *args, norm=None, activation=None, twice=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation, self.twice = norm, activation, twice

    def forward(self, x):
        if x.numel() == 0 and self.training:
            raise AssertionError("empty batch in training")
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        x = x if self.activation is None else self.activation(x)
        return x * 2 if self.twice else x


class DetectronBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = Wrapped(16, 8, 1, bias=False, norm=nn.BatchNorm2d(8))
        self.conv2 = Wrapped(8, 8, 3, padding=1, bias=False, norm=nn.BatchNorm2d(8))
        self.conv3 = Wrapped(8, 32, 1, bias=False, norm=nn.BatchNorm2d(32))
        self.shortcut = Wrapped(16, 32, 1, bias=False, norm=nn.BatchNorm2d(32))

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += self.shortcut(x) if self.shortcut is not None else x
        return F.relu_(out)


def test_detectron_blocks_are_fused_whole(trained):
    model = trained(nn.Sequential(DetectronBlock()))
    fused = rf.fuse(model)
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert_same_model(fused, model)
    assert [(row.conv, row.op) for row in rows(fused)] == [
        (f"0.{name}", "bottleneck") for name in ("conv1", "conv2", "conv3", "shortcut")
    ]


def test_wrapped_convolution_that_computes_more_computes_it_still(trained):
    model = trained(nn.Sequential(Wrapped(8, 8, 3, norm=nn.BatchNorm2d(8), activation=F.relu, twice=True)))
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert [row.op for row in rows(fused)] == ["conv2d_bn_relu"]
