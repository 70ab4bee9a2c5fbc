"""Values that kernels could lose or spread: NaN written behind PyTorch's back, large pixels, NaN and Inf."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torchvision
from support.kinds import Unit, check, counts, ops, unit
from torch import nn

import resnet_fused as rf

BACKENDS = ["auto", "reference", *(pytest.param(name, marks=pytest.mark.cpu) for name in ("onednn", "cpu"))]
NAN = float("nan")

LAYERS = {
    "stem-3x3": lambda: nn.Sequential(*unit(3, 32, 3, 2, 1)),
    "winograd": lambda: nn.Sequential(*unit(3, 8), *unit(8, 8)),
    "1x1": lambda: nn.Sequential(*unit(3, 16, 1, 1, 0)),
    "module": lambda: Unit(3, 16),
    "without-relu": lambda: nn.Sequential(*unit(3, 16)[:2]),
    "pooled-stem": lambda: nn.Sequential(*unit(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1)),
    "block": lambda: nn.Sequential(*unit(3, 16), torchvision.models.resnet.BasicBlock(16, 16)),
}


def _write_memory(x: torch.Tensor, memory: np.ndarray) -> None:
    memory[:] = np.nan


WRITES = {
    "numpy": _write_memory,
    "data": lambda x, memory: x.data.fill_(NAN),
    "in-place": lambda x, memory: x.fill_(NAN),
    "one-pixel": lambda x, memory: x.data[0, :, 7, 9].fill_(NAN),
    "one-pixel-numpy": lambda x, memory: memory.__setitem__((0, 7, 9), np.nan),
}
IN_MEMORY = ("numpy", "one-pixel-numpy")


def _hidden_writes():
    """The writes that are hardest to see: to all values, and to one pixel."""
    on_cpu = torch.get_default_device().type == "cpu"
    return [WRITES[name] for name in (("numpy", "one-pixel-numpy") if on_cpu else ("data", "one-pixel"))]


def _assert_nan_is_kept(model: nn.Module, fused: nn.Module, write, channels: int = 3) -> None:
    memory = np.zeros((1, 20, 20, channels), np.float32)
    x = torch.from_numpy(memory).permute(0, 3, 1, 2).to(torch.get_default_device())
    with torch.no_grad():
        fused(x)
        write(x, memory)
        got, want = fused(x), model(x)
    assert want.isnan().any()
    assert torch.equal(got.isnan(), want.isnan())
    assert counts(fused) == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "write",
    [pytest.param(write, id=name, marks=pytest.mark.cpu if name in IN_MEMORY else ()) for name, write in WRITES.items()],
)
def test_a_nan_that_is_written_into_the_input_after_a_call(write, backend, trained):
    model = trained(LAYERS["stem-3x3"]())
    _assert_nan_is_kept(model, rf.fuse(model, backend=backend), write)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("precision", ["fast", "direct"])
def test_a_nan_in_every_kind_of_layer(make, precision, trained):
    model = trained(make())
    for write in _hidden_writes():
        _assert_nan_is_kept(model, rf.fuse(model, precision=precision), write)


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("groups", [2, 8])
def test_a_nan_in_grouped_convolutions(groups, backend, trained):
    model = trained(nn.Sequential(*unit(8, 8, groups=groups)))
    fused = rf.fuse(model, backend=backend)
    _assert_nan_is_kept(model, fused, _hidden_writes()[0], channels=8)
    memory = torch.zeros(1, 8, 9, 9)
    memory[0, 3, 4, 4] = NAN  # of one group alone
    got = check(fused, model, memory)
    assert got.isnan().any()
    assert not got.isnan().all()


# ---- large finite values ---------------------------------------------------------------------------------------------


def _small(block=torchvision.models.resnet.BasicBlock):
    net = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)


SIZED = {
    **{name: (make, 24) for name, make in LAYERS.items()},
    "strided": (lambda: nn.Sequential(*unit(3, 16, 3, 2, 1)), 24),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=2, dilation=2), nn.BatchNorm2d(16)), 24),
    "grouped": (lambda: nn.Sequential(*unit(3, 6, groups=3)), 24),
    "resnet-basic": (_small, 96),
    "resnet-bottleneck": (lambda: _small(torchvision.models.resnet.Bottleneck), 96),
}
PIXELS = {
    "1e10": lambda dtype: 1e10,
    "largest": lambda dtype: torch.finfo(dtype).max,
    "3.4e38": lambda dtype: 3.4e38,
    "NaN": lambda dtype: NAN,
    "Inf": lambda dtype: float("inf"),
    "-9999": lambda dtype: -9999.0,
    "-1e6": lambda dtype: -1e6,
}


@pytest.mark.parametrize("pixel", PIXELS.values(), ids=PIXELS)
@pytest.mark.parametrize("make, size", SIZED.values(), ids=SIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_a_large_pixel_changes_no_element_that_its_window_does_not_reach(make, size, pixel, dtype, trained, request):
    model = trained(make()).to(dtype)
    fused = rf.fuse(model)
    clean = torch.randn(1, 3, size, size).to(dtype)
    dirty = clean.clone()
    dirty[0, :, 3, 5] = pixel(dtype)
    dirty[0, 0, -1, -2:] = pixel(dtype)
    exact = copy.deepcopy(model).double()
    untouched, touched = exact(clean.double()), exact(dirty.double())
    # Of all channels: one may be as it was by the ReLU that follows large values.
    outside = (untouched == touched).all(1, keepdim=True).expand_as(untouched)
    for _ in range(2):  # the first call of a kind of input, and later ones
        got, want = fused(dirty), model(dirty)
        if dtype is torch.float32:
            # On a GPU sums may overflow in one order of their terms, and not in another.
            same = outside if got.is_cuda else torch.ones_like(outside)
            assert torch.equal(got[same].isfinite(), want[same].isfinite())
            assert torch.equal(got[same].isnan(), want[same].isnan())
        else:
            # oneDNN takes the third channel with the next pixel's first, times zero, in stock too: NaN spreads by a column.
            reached = torch.nn.functional.max_pool2d((~outside).double(), 3, 1, 1) > 0
            assert not (got.isfinite() & ~touched.isfinite()).any()
            assert not (~got.isfinite() & ~reached).any()
        error, yardstick = ((y.double() - untouched)[outside] for y in (got, want))
        scale = untouched.abs().max()
        rounding = 2e-6 if dtype is torch.float32 else 2.0**-7
        if "resnet" in request.node.name:
            # Layers behind the first see values up to 256 times as large as those around them, beside which Winograd is right
            # to about 1e-4 (csrc/cpu/uneven.h).
            rounding = max(rounding, 1e-4)
        finite = error.isfinite() & yardstick.isfinite()
        limit = max(4 * float(yardstick[finite].abs().max()), float(scale) * rounding)
        assert float(error[finite].abs().max()) <= limit
    assert outside.float().mean() > 0.3
    assert counts(fused) == (2, 0)
    assert all(ops(fused))


@torch.no_grad()
def test_a_masked_region_in_a_sentinel_value(trained):
    """Satellite images hold −9999 where nothing was measured."""
    model = trained(_small())
    fused = rf.fuse(model)
    x = torch.randn(2, 3, 96, 96)
    x[:, :, :30, 20:] = -9999
    check(fused, model, x)
    check(fused, model, x.clone())


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e10])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_what_a_padded_layer_declines_is_not_padded_twice(mode, value, trained):
    """A kernel that leaves values to stock's ops hands them what it was given: an input that is padded already."""
    padded = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)
    if mode == "zeros":
        padded = nn.Conv2d(8, 8, 4, padding="same")  # more on one side than on the other
    convs = [nn.Conv2d(8, 8, 3, padding=1), padded, nn.Conv2d(8, 8, 3, padding=1)]
    model = trained(nn.Sequential(*[layer for conv in convs for layer in (conv, nn.BatchNorm2d(8), nn.ReLU())]))
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 12, 7)
    with torch.no_grad():
        fused(x)
        x[0, 0, 3, 3] = value
        want = model(x)
        torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert fused(x).stride() == want.stride()


@pytest.fixture
def relus(monkeypatch) -> list[int]:
    """Notes each ReLU that is a pass of its own."""
    found: list[int] = []
    relu_ = torch.Tensor.relu_
    monkeypatch.setattr(torch.Tensor, "relu_", lambda y: found.append(1) or relu_(y))
    return found


class WrittenInTheMiddle(nn.Module):
    """Writes NaN into what lies between two layers, by its own code."""

    def __init__(self, write) -> None:
        super().__init__()
        self.first, self.second, self.third, self.write = Unit(), Unit(), Unit(), write

    def forward(self, x):
        y = self.second(self.first(x))
        self.write(y)
        return self.third(y)


def _write_in_place(y):
    y[0, 0, 0, 0] = NAN


def _write_a_view(y):
    y.view(-1)[3] = NAN


@pytest.mark.cpu
@pytest.mark.parametrize("write", [_write_in_place, _write_a_view, lambda y: y.data.fill_(NAN)], ids=["", "view", "data"])
@torch.no_grad()
def test_a_nan_that_the_models_own_code_writes_between_layers(write, trained):
    model = trained(WrittenInTheMiddle(write))
    fused, x = rf.fuse(model, backend="onednn"), torch.randn(1, 8, 6, 6)
    for _ in range(3):
        got, want = fused(x), model(x)
        assert want.isnan().any()
        assert torch.equal(got.isnan(), want.isnan())
    assert counts(fused)[0] > 0


@pytest.mark.cpu
@torch.no_grad()
def test_onednns_own_relu_serves_where_no_nan_can_arise(trained, relus):
    model = trained(nn.Sequential(*unit(), *unit(), torchvision.models.resnet.BasicBlock(8, 8)).bfloat16())
    fused, x = rf.fuse(model, backend="onednn"), torch.randn(1, 8, 6, 6).bfloat16()
    if "onednn" not in {backend for row in rf.report(fused, file=io.StringIO()).rows for backend in row.backends.split("+")}:
        fused(x)
    want = fused(x)
    relus.clear()
    assert torch.equal(fused(x), want)
    assert not relus, "a ReLU was a pass of its own"
    for bad in (NAN, float("inf"), 3e38):
        y = x.clone()
        y[0, 3, 2, 2] = bad
        got, stock = fused(y), model(y)
        assert torch.equal(got.isfinite(), stock.isfinite())
        assert torch.equal(got.isnan(), stock.isnan())
    assert torch.equal(fused(x), want)


@pytest.mark.cpu
@torch.no_grad()
def test_sums_that_overflow_in_the_middle_of_a_program():
    """Inf in the first layer, and Inf - Inf in the second, though no input is infinite."""
    model = nn.Sequential(*unit(8, 8, 1, 1, 0), *unit(8, 8, 1, 1, 0)).eval()
    model[0].weight.fill_(1e19)
    model[3].weight.fill_(8.0)
    model[3].weight[:, ::2] = -8.0
    fused, x = rf.fuse(model, backend="onednn"), torch.full((1, 8, 6, 6), 1e20)
    for _ in range(2):
        got, want = fused(x), model(x)
        assert want.isnan().all()
        assert got.isnan().all()
