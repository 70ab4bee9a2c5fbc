"""Functions that follow a convolution, or a sum with one, are fused with it, and change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import rows
from support.kinds import check
from torch import nn

import resnet_fused as rf

LAYERS = {
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "silu": lambda: nn.SiLU(inplace=True),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
FUNCTIONS = {
    "relu6": lambda y: F.relu6(y, inplace=True),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2, True),
    "leaky_relu by its default": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "sigmoid, a method in place": lambda y: y.sigmoid_(),
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": lambda y: F.hardswish(y, True),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
X = torch.randn(2, 8, 9, 7)


class Follows(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), function

    def forward(self, x):
        return self.function(self.bn(self.conv(x)))


class Sum(Follows):
    """A residual whose sum is followed by a function, or where that is None, by nothing but its readers."""

    def __init__(self, function):
        super().__init__(function)
        self.last, self.bn_last = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn_last(self.last(self.bn(self.conv(x)))) + x
        return (y, y * 2) if self.function is None else self.function(y)


def _ops(fused):
    return [row.op for row in rows(fused)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, layout, trained):
    model = trained(Follows(LAYERS[name]()))
    fused = rf.fuse(model)
    x = X.contiguous(memory_format=layout)
    check(fused, model, x)
    check(fused, model, x[:1, :, :1, :1])
    assert _ops(fused) == [f"conv2d_bn_{name}"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function(name, trained):
    model = trained(Follows(FUNCTIONS[name]))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert _ops(fused) == [f"conv2d_bn_{name.split()[0].strip(',')}"]


@pytest.mark.parametrize("name", ["silu", "leaky_relu"])
def test_after_a_sum(name, trained):
    model = trained(Sum(LAYERS[name]()))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert _ops(fused) == ["conv2d_bn", f"conv2d_bn_add_{name}"]


def test_a_sum_that_nothing_follows(trained):
    model = trained(Sum(None))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert _ops(fused) == ["conv2d_bn", "conv2d_bn_add"]


UNUSUAL = {
    "another ceiling": lambda: _with(nn.ReLU6(), max_val=5.0),
    "a hook": lambda: _hooked(nn.SiLU()),
}


def _with(layer, **attributes):
    vars(layer).update(attributes)
    return layer


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_something_else_is_left_alone(make, trained):
    model = trained(Follows(make()))
    fused = rf.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X))
    assert _ops(fused) in (["conv2d_bn"], [""])


def test_through_the_compiler(trained):
    model = trained(Follows(nn.SiLU()))
    fused = rf.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True)(X), model(X))
