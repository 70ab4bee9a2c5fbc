"""Families of networks beyond the plain ResNet: what timm builds them of is traced through."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from kinds import assert_same, check, counts, ops
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
    "silu": ({"act_layer": nn.SiLU}, "conv2d_bn"),
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
