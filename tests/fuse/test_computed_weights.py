"""What a forward computes from its parameters by itself: scales and tables, and the weights of convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 9, 7)


class Standardised(nn.Conv2d):
    """A convolution with a standardised weight, as timm's ScaledStdConv2d (Brock et al., 2021)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain, self.scale, self.eps = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.1)), 0.3, 1e-6

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        scale = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Normalised(nn.Conv2d):
    """The same written out, as in BiT's first form, with its bias computed as well."""

    def forward(self, x):
        w = self.weight
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (w - m) / torch.sqrt(v + 1e-10), self.bias * 2, self.stride, self.padding)


class Coordinates(nn.Module):
    """A weight made of a table of numbers and of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        window = torch.arange(3, dtype=self.weight.dtype) - 1
        weight = self.weight * torch.exp(-window.square())[:, None] * self.weight.new_ones(3)
        return self.bn(F.conv2d(x, weight, padding=1)).relu()


class Shared(nn.Module):
    """Uses a computed weight twice, and gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        weight = self.weight * 0.1
        return F.conv2d(F.conv2d(x, weight, padding=1).relu(), weight, padding=1), weight


class Scaled(nn.Module):
    """As a ConvNeXt block: scales each channel by a parameter that must be reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma, self.bias = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Parameter(torch.rand(8)), None

    def forward(self, x):
        return x + self.conv(x).mul(self.gamma.reshape(1, -1, 1, 1))


class Tables(nn.Module):
    """As an attention with a table of biases, read at places that a buffer has."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.table = Unit(), nn.Parameter(torch.randn(2, 5))
        self.register_buffer("places", torch.arange(63) % 5)

    def forward(self, x):
        y = self.unit(x).flatten(2)
        return y + self.table[:, self.places].sum(0) + self.table.T[0, 0]


def _standardised():
    return nn.Sequential(Standardised(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Standardised(8, 6, 1, bias=False))


KINDS = {
    "standardised": (_standardised, ["conv2d_bn_relu", "conv2d"]),
    "written-out": (
        lambda: nn.Sequential(*unit(), Normalised(8, 8, 3, padding=1), nn.ReLU()),
        ["conv2d_bn_relu", "conv2d_relu"],
    ),
    "grouped": (lambda: nn.Sequential(Standardised(8, 8, 3, groups=2), nn.SiLU()), ["conv2d_silu"]),
    "table-of-numbers": (Coordinates, ["conv2d_bn_relu"]),
    "shared": (Shared, ["conv2d"]),
    "scaled": (Scaled, ["conv2d"]),
    "tables": (Tables, ["conv2d_bn_relu"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize(("make", "expected"), KINDS.values(), ids=KINDS)
def test_kinds(make, expected, format, dtype, trained):
    model = trained(make()).to(dtype)
    fused, x = rf.fuse(model), X.to(dtype).contiguous(memory_format=format)
    for _ in range(2):
        check(fused, model, x)
    assert ops(fused) == expected


def _in_place(m):
    m[0].weight.mul_(1.3), m[0].gain.add_(0.5)


def _data(m):
    m[0].gain.data = m[0].gain.data * 2


def _load(m):
    m.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in m.state_dict().items()})


def _setting(m):
    m[0].scale = 0.7


def _unseen(m):
    m[0].weight.data.numpy()[:] *= -1


CHANGES = {
    "in-place": _in_place,
    "data": _data,
    "loaded": _load,
    "setting": _setting,
    "numpy": _unseen,
    "cast": lambda m: m.double(),
    "another": lambda m: setattr(m[0], "gain", nn.Parameter(torch.full((8, 1, 1, 1), 0.2))),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name, marks=pytest.mark.cpu if name == "numpy" else ()) for name, change in CHANGES.items()],
)
@torch.no_grad()
def test_changes_of_what_a_weight_is_computed_from_are_followed(change, trained):
    model = trained(_standardised())
    fused = rf.fuse(model)
    check(fused, model, X)
    before = fused(X)
    change(model), change(fused)
    x = X.to(next(model.parameters()).dtype)
    for _ in range(3):
        assert_same(fused(x), model(x))
    assert not torch.equal(fused(x).float(), before)
    assert counts(fused)[0] >= 3


def test_training_and_derivatives_are_stocks(trained):
    model = trained(_standardised())
    fused = rf.fuse(model)
    check(fused, model, X)
    for m in (model, fused):
        m.zero_grad()
        m(X).square().sum().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    check(fused, model, X)


@torch.no_grad()
def test_autocast(trained):
    model = trained(_standardised())
    fused = rf.fuse(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fused(X), model(X)
        truth = copy.deepcopy(model).double()(X.double())
        assert got.dtype == want.dtype
        assert (got - truth).norm() <= 2 * (want - truth).norm() + 2**-8 * truth.norm()
    check(fused, model, X)


@torch.no_grad()
def test_in_graphs_the_weight_is_computed_at_each_call(trained):
    model = trained(nn.Sequential(*unit(), Standardised(8, 8, 3), nn.ReLU(), *unit(8, 8)))
    fused = rf.fuse(model)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    exported = torch.export.export(fused, (X,)).module()
    for _ in range(2):
        assert_same(compiled(X), model(X))
        assert_same(exported(X), model(X))
        for weight in {dict(m.named_parameters())["3.weight"] for m in (model, fused, exported)}:
            weight.mul_(-1.1)
    assert_same(torch.jit.trace(fused, X)(X), model(X))


@torch.no_grad()
def test_released_weights(trained):
    model = trained(nn.Sequential(*unit(), *_standardised()))
    fused = rf.fuse(model, example_inputs=X, release=True)
    assert_same(fused(X), model(X))
    with pytest.raises(RuntimeError, match="release=True"):
        fused[0].weight.sum()
    assert fused[3].weight.isfinite().all(), "what weights are computed from is read again"


# ---- what isn't recorded -----------------------------------------------------------------------------------------------


class _Of(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.weight, self.count = Unit(), nn.Parameter(torch.rand(8, 8, 1, 1)), 0

    def forward(self, x):
        return self.finish(self.unit(x))


class Branches(_Of):
    def finish(self, y):
        return y if self.weight.sum() > 0 else -y


class WritesParameter(_Of):
    def finish(self, y):
        self.weight.data.add_(1)
        return y * self.weight.mean()


class WritesView(_Of):
    def finish(self, y):
        self.weight.view(-1).mul_(2)
        return y * self.weight.mean()


class WritesWeight(_Of):
    """Changes a computed weight after it was computed, and before it is used."""

    def finish(self, y):
        weight = self.weight * 2
        weight.add_(1)
        return F.conv2d(y, weight)


class WritesPartOfWeight(_Of):
    def finish(self, y):
        weight = self.weight * 2
        weight.view(-1).add_(1)
        return F.conv2d(y, weight)


class Assigns(_Of):
    def finish(self, y):
        self.weight += 1
        return y * self.weight.mean()


class Drops(_Of):
    """Another weight at each call."""

    def finish(self, y):
        return F.conv2d(y, F.dropout(self.weight, 0.5, True))


class Numbers(_Of):
    def finish(self, y):
        return y * float(self.weight.mean()) + int(self.weight.argmax())


class Random(_Of):
    def finish(self, y):
        return F.conv2d(y, self.weight + torch.randn(8, 8, 1, 1))


class OfInput(_Of):
    """A weight that depends on the input, as CondConv's."""

    def finish(self, y):
        return F.conv2d(y, self.weight * y.mean())


UNRECORDED = (Branches, WritesParameter, WritesView, WritesWeight, WritesPartOfWeight, Assigns, Drops, Numbers, Random, OfInput)


@pytest.mark.parametrize("kind", UNRECORDED)
@torch.no_grad()
def test_what_depends_on_values_or_has_effects_is_as_in_stock(kind, trained):
    model = trained(nn.Sequential(*unit(), kind()))
    fused = rf.fuse(model)
    for _ in range(3):
        torch.manual_seed(1)
        got = fused(X)
        torch.manual_seed(1)
        assert_same(got, model(X))
        assert_same({**fused.state_dict()}, {**model.state_dict()})
        for m in (model, fused):
            m[3].weight.mul_(-0.9)
