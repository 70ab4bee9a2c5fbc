"""Squeeze-and-excite and its like: product with a gate, sum and function are one pass, the mean over pixels is our kernel's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import needs_kernels, runs, served
from support.kinds import check, outcome
from torch import nn

import resnet_fused as rf

pytestmark = pytest.mark.cpu
CL = torch.channels_last
X = torch.randn(2, 16, 9, 7)


class Gate(nn.Module):
    """Squeeze-and-excite, as timm writes it."""

    function: type[nn.Module] = nn.Sigmoid

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.act, self.gate = nn.ReLU(inplace=True), self.function()

    def squeeze(self, x):
        return x.mean((2, 3), keepdim=True)

    def excite(self, x):
        return self.gate(self.fc2(self.act(self.fc1(self.squeeze(x)))))

    def forward(self, x):
        return x * self.excite(x)


class Pooled(Gate):
    """As torchvision writes it."""

    function = nn.Hardsigmoid

    def __init__(self, channels: int = 16) -> None:
        super().__init__(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def squeeze(self, x):
        return self.pool(x)

    def forward(self, x):
        return self.excite(x) * x


class PooledByFunction(Gate):
    def squeeze(self, x):
        return F.adaptive_avg_pool2d(x, (1, 1))


class MeanOfNegativeDims(Gate):
    def squeeze(self, x):
        return torch.mean(x, dim=[-1, -2], keepdim=True)


class InPlace(Gate):
    def forward(self, x):
        x *= self.excite(x)
        return x


class ByMethod(Gate):
    def forward(self, x):
        return x.mul_(self.excite(x))


class Linears(nn.Module):
    """As a well-known implementation of SENet writes it."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4, bias=False), nn.ReLU(), nn.Linear(4, channels, bias=False), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Eca(nn.Module):
    """Efficient channel attention, as timm writes it."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Sigmoid()

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * self.gate(y).view(x.shape[0], -1, 1, 1).expand_as(x)


class Effective(nn.Module):
    """One convolution."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.fc, self.gate = nn.Conv2d(channels, channels, 1), nn.Hardsigmoid()

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))


class Block(nn.Module):
    """A convolution, the gate, and what follows."""

    def __init__(self, gate: nn.Module, follows=lambda y, x: F.relu(y + x)) -> None:
        super().__init__()
        self.conv, self.bn, self.se, self.follows = (
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            gate,
            follows,
        )

    def forward(self, x):
        return self.follows(self.se(self.bn(self.conv(x))), x)


def labels(fused: nn.Module) -> list[str]:
    """Ops that our kernels served beside convolutions."""
    return [op for op, backend in served(fused) if "gate" in op and backend == "cpu"]


GATES = (Gate, Pooled, PooledByFunction, MeanOfNegativeDims, InPlace, ByMethod, Linears, Eca, Effective)


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_every_spelling(gate, layout, trained):
    model = trained(Block(gate()))
    fused = rf.fuse(model)
    for x in (X, X, X[:1], torch.randn(8, 16, 5, 6)):
        check(fused, model, x.contiguous(memory_format=layout))
    assert {*labels(fused)} == {"gate_add_relu"}
    assert len(labels(fused)) == 3  # for each kind of input


def _iadd(y, x):
    y += x
    return y.relu_()


FOLLOWING = {
    "nothing": (lambda y, x: y, "gate"),
    "function": (lambda y, x: F.silu(y), "gate_silu"),
    "sum": (lambda y, x: y + x, "gate_add"),
    "sum in place, ReLU in place": (_iadd, "gate_add_relu"),
    "sum from the other side": (lambda y, x: torch.relu(x + y), "gate_add_relu"),
    "sum, hardswish": (lambda y, x: F.hardswish(y.add(x)), "gate_add_hardswish"),
    "sum, GELU": (lambda y, x: F.gelu(y + x), "gate_add_gelu"),
    "sum that is read twice": (lambda y, x: (lambda s: F.relu(s) + s)(y + x), "gate_add"),
    "sum with itself": (lambda y, x: F.relu(y + y), "gate"),
    "scaled sum": (lambda y, x: F.relu(torch.add(y, x, alpha=2)), "gate"),
    "sum with one image": (lambda y, x: F.relu(y + x[:1]), None),
    "result that is read again": (lambda y, x: F.relu(y) + y, "gate"),
}


@needs_kernels
@pytest.mark.parametrize("follows, op", FOLLOWING.values(), ids=FOLLOWING)
def test_what_follows(follows, op, trained):
    model = trained(Block(Gate(), follows))
    fused = rf.fuse(model)
    for _ in range(3):
        check(fused, model, X)
    if op is not None:
        assert {*labels(fused)} == {op}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 56, 56), (3, 16, 2, 2), (8, 16, 7, 7)], ids=str)
def test_values_are_as_good_as_stocks(dtype, shape, trained):
    model = trained(Block(Gate())).to(dtype)
    fused = rf.fuse(model)
    check(fused, model, torch.randn(shape).to(dtype))
    assert labels(fused) == ["gate_add_relu"]


@needs_kernels
@torch.no_grad()
def test_nan_and_infinity_are_where_stock_has_them(trained):
    model = trained(Block(Gate()))
    fused = rf.fuse(model, precision="direct")
    x = X.clone()
    x[0, 3, 1, 1], x[1, 4, 4, 4] = math.nan, math.inf
    got, want = fused(x), model(x)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)


@needs_kernels
@torch.no_grad()
def test_a_network_of_blocks_is_one_native_call(trained):
    model = trained(nn.Sequential(Block(Gate()), Block(Pooled()), Block(Effective())))
    fused = rf.fuse(model)
    x = X.contiguous(memory_format=CL)
    check(fused, model, x)
    (run,) = runs(fused)
    assert len(run.operations) == 1
    assert len(run.problems) == 3 * 2 + 2 * 2 + 1  # convolutions and gates; of a gate's convolutions, two, two and one


class Spatial(Gate):
    """A gate for each pixel, made of a mean over channels."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean(1, keepdim=True))


class OneImage(Gate):
    """The gate of the first image for all."""

    def forward(self, x):
        return x * self.excite(x[:1])


class HalfMean(Gate):
    """Of the columns alone."""

    def squeeze(self, x):
        return x.mean(2, keepdim=True)


class OtherPool(Gate):
    def squeeze(self, x):
        return F.adaptive_avg_pool2d(x, (1, 2))


class ReadAfterwards(Gate):
    """x is read after a product was written into it."""

    def forward(self, x):
        y = x.mul_(self.excite(x))
        return y + x.mean()


class OverwrittenBetween(Gate):
    def forward(self, x):
        y = self.excite(x).expand_as(x)
        x += 1
        return x * y


class Doubled(Gate):
    """A product of gates."""

    def forward(self, x):
        return x + self.excite(x) * self.squeeze(x)


class Wide(Gate):
    """A gate of another dtype."""

    def forward(self, x):
        return x.double() * self.excite(x).double()


LEFT_ALONE = (Spatial, OneImage, HalfMean, OtherPool, ReadAfterwards, Doubled, Wide)


@pytest.mark.parametrize("gate", [*LEFT_ALONE, OverwrittenBetween], ids=lambda gate: gate.__name__)
def test_other_products_keep_their_meaning(gate, trained):
    model = trained(Block(gate()))
    fused = rf.fuse(model)
    for x in (X, X.contiguous(memory_format=CL), X):
        check(fused, model, x)
    if gate in LEFT_ALONE:
        assert labels(fused) == []


SIZES = {"one pixel": (2, 16, 1, 1), "one row": (2, 16, 1, 5), "one column": (1, 16, 6, 1)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_sizes_whose_format_stock_doesnt_keep(shape, layout, trained):
    for gate in (Gate, Pooled, Effective, Eca):
        model = trained(Block(gate()))
        check(rf.fuse(model), model, torch.randn(shape).contiguous(memory_format=layout))


def test_one_channel(trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1), Gate(1)))
    fused = rf.fuse(model)
    for layout in (torch.contiguous_format, CL):
        check(fused, model, torch.randn(2, 3, 6, 6).contiguous(memory_format=layout))


def test_no_images(trained):
    model = trained(Block(Gate()))
    check(rf.fuse(model), model, X[:0], served=False)


def test_a_gate_with_a_hook_is_called(trained):
    model, seen = trained(Block(Gate())), []
    fused = rf.fuse(model)
    for m in (model, fused):
        m.se.gate.register_forward_hook(lambda module, args, y: seen.append(y.shape) or 2 * y)
    check(fused, model, X)
    assert seen[:2] == 2 * [(2, 16, 1, 1)]


@pytest.mark.parametrize("chosen", ["reference", "onednn"])
def test_another_backend_leaves_them_to_stock(chosen, trained):
    model = trained(Block(Gate()))
    fused = rf.fuse(model)
    with rf.use_backend(chosen):
        check(fused, model, X)
    assert labels(fused) == []


def test_autocast_and_other_dtypes_go_to_stock(trained):
    model = trained(Block(Gate()))
    fused = rf.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fused(X), model(X)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    wide = copy.deepcopy(model).double()
    check(rf.fuse(wide), wide, X.double())
    assert labels(fused) == []


def test_a_derivative_is_stocks(trained):
    model = trained(Block(Gate()))
    fused, grads = rf.fuse(model), []
    for m in (fused, model):
        given = X.clone().requires_grad_()
        m(given).sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)


def test_a_residual_that_is_too_small_raises_stocks_error(trained):
    model = trained(Block(Gate(), lambda y, x: F.relu(y + x[..., :-1])))
    fused = rf.fuse(model)
    for _ in range(2):
        ours, stocks = outcome(fused, (X,), {}), outcome(model, (X,), {})
        assert type(ours) is type(stocks) is RuntimeError
        assert str(ours) == str(stocks)


@pytest.mark.parametrize("gate", [Gate, Pooled, Eca], ids=lambda gate: gate.__name__)
def test_through_the_compiler(gate, trained):
    model = trained(Block(gate()))
    fused = rf.fuse(model)
    fused(X)
    with torch.no_grad():
        for x in (X, X.contiguous(memory_format=CL)):
            got, want = torch.compile(fused, fullgraph=True)(x), model(x)
            torch.testing.assert_close(got, want)
            assert got.stride() == want.stride()


def test_in_an_exported_program(trained):
    model = trained(Block(Gate()))
    fused = rf.fuse(model)
    with torch.no_grad():
        fused(X)
        exported = torch.export.export(fused, (X,))
        assert any("resnet_fused.program" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(X), model(X))
