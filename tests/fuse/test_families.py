"""Families of networks beyond the plain ResNet: what timm builds them of is traced through."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from support.kinds import assert_same, check, counts, ops
from timm.layers import BatchNormAct2d
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 9, 7)


class NormAct(nn.Module):
    """A convolution with timm's batch norm, which has its activation inside."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = BatchNormAct2d(8, **kwargs)

    def forward(self, x):
        return self.bn(self.conv(x))


KINDS = {
    "relu": ({}, "conv2d_bn_relu"),
    "not-in-place": ({"inplace": False}, "conv2d_bn_relu"),
    "no-activation": ({"apply_act": False}, "conv2d_bn"),
    "silu": ({"act_layer": nn.SiLU}, "conv2d_bn_silu"),
    "not-affine": ({"affine": False}, "conv2d_bn_relu"),
    "momentum-none": ({"momentum": None}, "conv2d_bn_relu"),
    "dropped": ({"drop_layer": nn.Dropout}, "conv2d_bn_relu"),
}


@pytest.mark.parametrize(("kwargs", "op"), KINDS.values(), ids=KINDS)
def test_a_batch_norm_with_its_activation_inside(kwargs, op, trained):
    model = trained(NormAct(**kwargs))
    fused = rf.fuse(model)
    check(fused, model, X)
    check(fused, model, X)
    assert ops(fused) == [op]
    assert counts(fused) == (2, 0)


def _statistics(m):
    m.bn.running_mean.add_(0.5)


def _another_activation(m):
    m.bn.act = nn.Tanh()


def _hook(m):
    m.bn.act.register_forward_hook(lambda module, args, y: y * 2)


def _hook_on_the_norm(m):
    m.bn.register_forward_hook(lambda module, args, y: y + 1)


CHANGES = {
    "training": lambda m: m.bn.train(),
    "statistics": _statistics,
    "activation": _another_activation,
    "hook-on-the-activation": _hook,
    "hook": _hook_on_the_norm,
    "eps": lambda m: setattr(m.bn, "eps", 0.3),
    "no-statistics": lambda m: (setattr(m.bn, "running_mean", None), setattr(m.bn, "running_var", None)),
    "weight": lambda m: m.bn.weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_what_changes_inside_of_it_is_followed(change, when, trained):
    model = trained(NormAct())
    if when == "before":
        change(model)
    fused = rf.fuse(model)
    if when == "after":
        check(fused, model, X)
        before = fused(X)
        change(fused), change(model)
        assert not torch.equal(copy.deepcopy(model)(X), before)
    for _ in range(2):
        assert_same(fused(X), model(X))
    assert_same({**fused.state_dict()}, {**model.state_dict()})


# Names of timm's, and how many of their convolutions must be fused at least.
MODELS = {"regnetx_002": 1.0, "cspresnet50": 1.0, "repvgg_a0": 1.0, "mobilenetv2_035": 1.0, "skresnet18": 0.8}


@pytest.mark.parametrize(("name", "share"), MODELS.items())
@torch.no_grad()
def test_a_model_of_timm(name, share, trained):
    model = trained(timm.create_model(name, pretrained=False))
    fused, x = rf.fuse(model), torch.randn(1, 3, 64, 64)
    check(fused, model, x)
    found = ops(fused)
    assert sum(bool(op) for op in found) >= share * len(found)
    assert counts(fused) == (1, 0)


class SqueezeExcite(nn.Module):
    """A gate by two convolutions with biases, which scale what a sum is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.main = NormAct(apply_act=False)
        self.reduce, self.expand, self.relu = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.main(x)
        gate = self.expand(self.relu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        return (y * gate + x).relu()


class SecondReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y.mean(), y


class InPlace(SecondReader):
    """Writes into a convolution's result before others read it."""

    def forward(self, x):
        y = self.conv(x)
        z = y.add_(1)
        return torch.relu_(z) + y, self.bn(y).relu_()


class SumOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return (self.a(x) + self.b(x)).relu()


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNormAct2d(8), BatchNormAct2d(8)
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))) + x


def _in_training_mode():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].train()
    return model


def _hooked():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda module, args, y: y * 2)
    return model


WITHOUT = {
    "squeeze-excite": (SqueezeExcite, ["conv2d_bn", "conv2d_relu", "conv2d_sigmoid"]),
    "second-reader": (SecondReader, ["conv2d"]),
    "in-place": (InPlace, ["conv2d"]),
    "sum": (SumOfTwo, None),
    "pre-activation": (PreActivation, ["conv2d_bn_relu", "conv2d_add"]),
    "vgg": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)), ["stem"]),
    "group-norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()), ["conv2d"]),
    "alone": (lambda: nn.Sequential(nn.Conv2d(8, 5, 3, 2, bias=False)), ["conv2d"]),
    "uneven-padding": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()), None),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Sigmoid()), ["conv2d_sigmoid"]),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(8, 3, 3), nn.Flatten()), ["conv2d"]),
    "statistics-of-the-batch": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()),
        ["conv2d"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize(("make", "expected"), WITHOUT.values(), ids=WITHOUT)
def test_convolutions_that_no_batch_norm_follows(make, expected, format, dtype, trained):
    model = trained(make()).to(dtype)
    fused, x = rf.fuse(model), X.to(dtype).contiguous(memory_format=format)
    for _ in range(2):
        check(fused, model, x)
    check(fused, model, x[..., :4, :3])
    assert all(ops(fused))
    if expected is not None:
        assert ops(fused) == expected


@pytest.mark.parametrize("make", [_in_training_mode, _hooked])
@torch.no_grad()
def test_a_batch_norm_that_cannot_be_folded_stays_and_says_why(make):
    model = make()
    fused = rf.fuse(model)
    for _ in range(2):
        assert_same(fused(X), model(X))
    assert_same({**fused.state_dict()}, {**model.state_dict()})
    assert counts(fused) == (2, 0)
    (row,) = rf.report(fused, file=io.StringIO()).rows
    assert row.op == "conv2d"
    assert ("training mode" if make is _in_training_mode else "forward hooks") in row.note


@torch.no_grad()
def test_values_of_a_weight_without_a_batch_norm_are_followed(trained):
    model = trained(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    fused = rf.fuse(model)
    check(fused, model, X)
    for m in (fused, model):
        m[0].weight.mul_(-2)
        m[0].bias.add_(1)
    check(fused, model, X)
    released = rf.fuse(model, example_inputs=X, release=True)
    assert_same(released(X), model(X))
