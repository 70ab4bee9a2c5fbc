"""Convolutions of one and of three dimensions: those of signals, and of videos and volumes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import served
from support.kinds import assert_same, check, counts, ops, outcome
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import Conv
from resnet_fused.runtime.views import View, view_of


def unit1(inside=8, outside=8, kernel=3, stride=1, **kwargs):
    kwargs.setdefault("padding", kernel // 2)
    return [nn.Conv1d(inside, outside, kernel, stride, **kwargs), nn.BatchNorm1d(outside), nn.ReLU()]


def unit3(inside=8, outside=8, kernel=(3, 3, 3), stride=1, **kwargs):
    kwargs.setdefault("padding", tuple(k // 2 for k in kernel))
    return [nn.Conv3d(inside, outside, kernel, stride, bias=False, **kwargs), nn.BatchNorm3d(outside), nn.ReLU(inplace=True)]


class Block(nn.Module):
    """A residual block of units: the first whole, the second without its activation."""

    def __init__(self, first, second, shortcut=None) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(*first), nn.Sequential(*second[:2])
        self.shortcut = nn.Identity() if shortcut is None else nn.Sequential(*shortcut[:2])
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return F.relu(self.second(self.drop(self.first(x))) + self.shortcut(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, _ = unit1()

    def forward(self, x):
        y = F.conv1d(x, self.conv.weight, None, 2, 1)
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias).relu_()


class PreActivation(nn.Module):
    """As in ResNets for the ECG (Ribeiro et al., 2020): two results, and a shortcut by a max-pool and a 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = unit1(kernel=17, bias=False)
        self.conv2, self.bn2 = nn.Conv1d(8, 8, 17, 4, 7, bias=False), nn.BatchNorm1d(8)
        self.skip = nn.Sequential(nn.MaxPool1d(4, 4), nn.Conv1d(8, 8, 1, bias=False))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(self.relu(self.bn1(self.conv1(x))))
        z = self.conv2(y) + self.skip(x)
        return self.drop(self.relu(self.bn2(z))), z


class Gated(nn.Module):
    """Squeeze-and-excite for signals; asks for the number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(*unit1()[:2])
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(8, 2, 1), nn.ReLU(), nn.Conv1d(2, 8, 1), nn.Sigmoid())

    def forward(self, x):
        if x.dim() != 3:
            raise ValueError("no signals")
        y = self.main(x)
        return torch.relu(y * self.gate(y) + x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Sequential(*unit1()), nn.Sequential(nn.MaxPool1d(2), *unit1(8, 16))
        self.up, self.merge = nn.ConvTranspose1d(16, 8, 2, 2), nn.Sequential(*unit1(16, 8))

    def forward(self, x):
        y = self.down(x)
        return self.merge(torch.cat((y, self.up(self.inner(y))), 1))


class OfBoth(nn.Module):
    """A front end for signals before a network for images, as audio models have."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = (
            nn.Sequential(*unit1(8, 6, 5, 2)),
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        )

    def forward(self, x):
        return self.back(self.front(x).unsqueeze(1))


def _assert_same_outcome(fused, model, x) -> None:
    """Asserts that a fused model gives, or raises, what its original does."""
    want, got = outcome(model, (x,), {}), outcome(fused, (x,), {})
    if isinstance(want, Exception):
        assert (type(got), str(got)) == (type(want), str(want))
    else:
        assert_same(got, want)


SIGNALS = {
    "units": (lambda: nn.Sequential(*unit1(), *unit1(8, 12, 7, 2)), ["conv1d_bn_relu"] * 2),
    "even-same": (lambda: nn.Sequential(*unit1(kernel=16, padding="same")), ["conv1d_bn_relu"]),
    "circular": (lambda: nn.Sequential(*unit1(padding_mode="circular")), ["conv1d_bn_relu"]),
    "reflect": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()), ["conv1d_relu"]),
    "dilated": (lambda: nn.Sequential(*unit1(dilation=4, padding=4)), ["conv1d_bn_relu"]),
    "grouped": (lambda: nn.Sequential(*unit1(groups=2), *unit1(groups=8, stride=2)), ["conv1d_bn_relu"] * 2),
    "no-bias-alone": (lambda: nn.Sequential(nn.Conv1d(8, 5, 3, bias=False)), ["conv1d"]),
    "one-channel": (lambda: nn.Sequential(*unit1(8, 1), nn.Conv1d(1, 8, 3)), ["conv1d_bn_relu", "conv1d"]),
    "silu": (lambda: nn.Sequential(*unit1()[:2], nn.SiLU()), ["conv1d_bn_silu"]),
    "gelu-alone": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.GELU()), ["conv1d_gelu"]),
    "not-affine": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8, affine=False)), ["conv1d_bn"]),
    "stem": (lambda: nn.Sequential(*unit1(8, 16, 15, 2), nn.MaxPool1d(3, 2, 1)), ["stem"]),
    "dilated-pool": (lambda: nn.Sequential(*unit1(), nn.MaxPool1d(2, 1, dilation=2)), ["conv1d_bn_relu"]),
    "block": (lambda: Block(unit1(), unit1()), ["basic_block"] * 2),
    "projected": (lambda: Block(unit1(8, 12, 7, 2), unit1(12, 12, 7), unit1(8, 12, 1, 2)), ["basic_block"] * 3),
    "functional": (Functional, ["conv1d_bn_relu"]),
    "pre-activation": (PreActivation, ["conv1d_bn_relu", "conv1d_add", "conv1d"]),
    "gated": (Gated, ["conv1d_bn", "conv1d_relu", "conv1d_sigmoid"]),
    "u-net": (UNet, ["conv1d_bn_relu"] * 3),
    "of-both": (OfBoth, ["conv1d_bn_relu", "conv2d_bn_relu"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "expected"), SIGNALS.values(), ids=SIGNALS)
def test_signals(make, expected, dtype, trained):
    model = trained(make()).to(dtype)
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 64, dtype=dtype)
    # As the caller has it, as (N, L, C) transposed, a part of a longer signal, and of one signal.
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[..., 3:51], x[:1]):
        check(fused, model, given)
        check(fused, model, given)
    assert ops(fused) == expected


@pytest.mark.cpu
def test_signals_run_on_the_kernels_for_images(trained):
    model = trained(nn.Sequential(*unit1(), Block(unit1(), unit1())))
    fused = rf.fuse(model)
    check(fused, model, torch.randn(1, 8, 64))
    assert [op for op, _ in served(fused)] == ["conv2d_bn_relu", "basic_block"]


KINDS_OF_SIGNALS = {
    "one-value": torch.randn(2, 8, 1),
    "one-signal-of-one-value": torch.randn(1, 8, 1),
    "unbatched": torch.randn(8, 8),
    "expanded": torch.randn(1, 8, 1).expand(3, 8, 16),
    "strided": torch.randn(2, 8, 64)[..., ::2],
    "no-signal": torch.randn(0, 8, 16),
    "four-dimensions": torch.randn(1, 8, 4, 4),
    "other-channels": torch.randn(1, 7, 16),
}


@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "no-bn"])
@pytest.mark.parametrize("x", KINDS_OF_SIGNALS.values(), ids=KINDS_OF_SIGNALS)
@torch.no_grad()
def test_kinds_of_signals(x, batch_norm, trained):
    layers = unit1()
    model = trained(nn.Sequential(*(layers if batch_norm else (layers[0], layers[2]))))
    fused = rf.fuse(model)
    for _ in range(2):
        _assert_same_outcome(fused, model, x)


MISMATCHED = {
    "2d-after-1d": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 8, 9)),
    "1d-after-2d": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm1d(8)), torch.randn(2, 8, 9, 9)),
    "3d-after-2d": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm3d(8)), torch.randn(2, 8, 9, 9)),
    "1d-after-3d": (lambda: nn.Sequential(nn.Conv3d(8, 8, 3), nn.BatchNorm1d(8)), torch.randn(2, 8, 9, 9, 9)),
    "1d-dropout-after-2d": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Dropout1d(), nn.ReLU()), torch.randn(2, 8, 9, 9)),
}


@pytest.mark.parametrize(("make", "x"), MISMATCHED.values(), ids=MISMATCHED)
@torch.no_grad()
def test_what_stock_refuses_is_refused_in_its_words(make, x):
    model = make().eval()
    assert isinstance(outcome(model, (x,), {}), Exception)
    _assert_same_outcome(rf.fuse(model), model, x)


# ---- three dimensions --------------------------------------------------------------------------------------------------

VOLUMES = {
    "whole": (lambda: nn.Sequential(*unit3(), *unit3(8, 12, (3, 3, 3), 2)), ["conv3d_bn_relu"] * 2, {"onednn"}),
    "frames": (
        lambda: nn.Sequential(*unit3(kernel=(1, 3, 3)), *unit3(8, 16, (1, 3, 3), (1, 2, 2))),
        ["conv3d_bn_relu"] * 2,
        None,
    ),
    "time": (
        lambda: nn.Sequential(*unit3(kernel=(3, 1, 1)), *unit3(8, 16, (5, 1, 1), (2, 1, 1))),
        ["conv3d_bn_relu"] * 2,
        None,
    ),
    "pointwise": (lambda: nn.Sequential(*unit3(kernel=(1, 1, 1)), *unit3(8, 8, (1, 1, 1), 2)), ["conv3d_bn_relu"] * 2, None),
    "bias": (lambda: nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.GELU()), ["conv3d_gelu"], None),
    "alone": (lambda: nn.Sequential(nn.Conv3d(8, 6, (1, 3, 3), bias=False)), ["conv3d"], None),
    "even-same": (lambda: nn.Sequential(*unit3(kernel=(2, 4, 3), padding="same")), ["conv3d_bn_relu"], None),
    "grouped": (lambda: nn.Sequential(*unit3(groups=2), *unit3(groups=8), *unit3(kernel=(1, 3, 3), groups=8)), None, None),
    "one-channel": (lambda: nn.Sequential(*unit3(8, 1), nn.Conv3d(1, 8, 3)), ["conv3d_bn_relu", "conv3d"], None),
    "dilated-frames": (lambda: nn.Sequential(*unit3(kernel=(1, 3, 3), dilation=(1, 2, 2), padding=(0, 2, 2))), None, None),
    "block": (lambda: Block(unit3(), unit3()), ["conv3d_bn_relu", "conv3d_bn_add_relu"], {"onednn"}),
    "projected": (lambda: Block(unit3(8, 12, (3, 3, 3), 2), unit3(12, 12), unit3(8, 12, (1, 1, 1), 2)), None, {"onednn"}),
    "block-of-frames": (lambda: Block(unit3(kernel=(1, 3, 3)), unit3(kernel=(1, 3, 3))), ["basic_block"] * 2, None),
    "frames-and-time": (
        lambda: Block(unit3(8, 12, (1, 3, 3)), unit3(12, 8, (3, 1, 1))),
        ["conv3d_bn_relu", "conv3d_bn_add_relu"],
        None,
    ),
    "stem-of-frames": (
        lambda: nn.Sequential(*unit3(8, 16, (1, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))),
        ["stem"],
        None,
    ),
    "pool-over-time": (lambda: nn.Sequential(*unit3(kernel=(1, 3, 3)), nn.MaxPool3d(2)), ["conv3d_bn_relu"], None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "expected", "backends"), VOLUMES.values(), ids=VOLUMES)
def test_volumes(make, expected, backends, dtype, trained):
    model = trained(make()).to(dtype)
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 5, 9, 8, dtype=dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d), x[:, :, 1:, ::2], x[:1]):
        check(fused, model, given)
        check(fused, model, given)
    assert all(ops(fused)) if expected is None else ops(fused) == expected
    if backends is not None and dtype is torch.float32 and x.device.type == "cpu":
        assert {name for _, name in served(fused)} == backends


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_weights_in_channels_last_3d_and_one_thread(threads, trained):
    """Where stock doesn't take oneDNN, its results have other strides."""
    model = trained(nn.Sequential(*unit3(), nn.Conv3d(8, 8, 3), nn.Conv3d(8, 4, (1, 3, 3)))).to(
        memory_format=torch.channels_last_3d
    )
    fused = rf.fuse(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 17):
            x = torch.randn(n, 8, 5, 7, 6)
            for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
                assert_same(fused(given), model(given))
    finally:
        torch.set_num_threads(before)


KINDS_OF_VOLUMES = {
    "one-voxel": torch.randn(2, 8, 1, 1, 1),
    "one-frame": torch.randn(2, 8, 1, 6, 6),
    "one-pixel-a-frame": torch.randn(1, 8, 6, 1, 1),
    "unbatched": torch.randn(8, 4, 6, 6),
    "expanded": torch.randn(1, 8, 1, 1, 1).expand(2, 8, 4, 5, 6),
    "nothing": torch.randn(0, 8, 4, 4, 4),
}


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("x", KINDS_OF_VOLUMES.values(), ids=KINDS_OF_VOLUMES)
@torch.no_grad()
def test_kinds_of_volumes(x, kernel, trained):
    model = trained(nn.Sequential(*unit3(kernel=kernel), nn.Conv3d(8, 8, kernel, padding=tuple(k // 2 for k in kernel))))
    fused = rf.fuse(model)
    for given in (x, x.to(memory_format=torch.channels_last_3d) if x.dim() == 5 else x):
        for _ in range(2):
            _assert_same_outcome(fused, model, given)


@torch.no_grad()
def test_residuals_of_other_shapes_are_left_to_stock(trained):
    """Seen as frames, 2 videos of 3 frames are as 3 of 2."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))

        def forward(self, x, y):
            return F.relu(self.conv(x) + y)

    model = trained(Sum())
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 3, 5, 5)
    for y in (torch.randn(1, 8, 3, 5, 5), torch.randn(3, 8, 1, 5, 5), torch.randn(3, 8, 3, 5, 5), torch.randn(1, 8, 3, 5, 1)):
        for _ in range(2):
            check(fused, model, x, y)
    with pytest.raises(RuntimeError, match="must match"):
        fused(x, torch.randn(3, 8, 2, 5, 5))


DILATED = {
    "dilated": nn.Conv3d(8, 8, 3, dilation=2, padding=2),
    "circular": nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), padding_mode="circular"),
}


@pytest.mark.parametrize("conv", DILATED.values(), ids=DILATED)
def test_what_is_left_alone_in_three_dimensions_says_why(conv, trained):
    model = trained(nn.Sequential(*unit3(), conv, nn.BatchNorm3d(8), nn.ReLU()))
    fused = rf.fuse(model)
    check(fused, model, torch.randn(1, 8, 6, 7, 6))
    first, second = rf.report(fused, file=io.StringIO()).rows
    assert first.op
    assert not second.op
    assert "three dimensions" in second.note
    assert "three dimensions" in first.note


def test_how_convolutions_are_seen():
    def seen(kernel, stride=(1, 1, 1), padding=(0, 0, 0)):
        return view_of(Conv(1, 1, kernel, stride, padding, (1, 1, 1)))

    assert seen((1, 3, 3), (1, 2, 2), (0, 1, 1)) is View.FRAMES
    assert seen((3, 1, 1), (2, 1, 1), (1, 0, 0)) is View.PIXELS
    assert seen((1, 1, 1)) is View.FRAMES
    assert seen((1, 1, 1), (2, 1, 1)) is View.PIXELS
    for kernel, stride, padding in (
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 2), (0, 0, 0)),
        ((1, 3, 3), (1, 1, 1), (1, 1, 1)),  # frames of padding alone
        ((3, 1, 3), (1, 1, 1), (1, 0, 1)),
    ):
        assert seen(kernel, stride, padding) is View.SAME
    assert view_of(Conv(1, 1, (3,), (1,), (1,), (1,))) is View.ROW
    assert view_of(Conv(1, 1, (1, 3))) is View.SAME


# ---- promises ----------------------------------------------------------------------------------------------------------


def _signal_net():
    return nn.Sequential(
        *unit1(8, 16, 7, 2), Block(unit1(16, 16), unit1(16, 16)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3)
    )


def _video_net():
    parts = (
        *unit3(8, 16, (3, 3, 3)),
        Block(unit3(16, 24, (1, 3, 3)), unit3(24, 16, (3, 1, 1))),
        Block(unit3(16, 16), unit3(16, 16)),
    )
    return nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 3))


NETS = {"signals": (_signal_net, torch.randn(2, 8, 64)), "videos": (_video_net, torch.randn(2, 8, 4, 12, 10))}
of_nets = pytest.mark.parametrize(("make", "x"), NETS.values(), ids=NETS)


@of_nets
@torch.no_grad()
def test_nan_and_inf_stay_where_they_are_in_stock(make, x, trained):
    model = trained(make()[:4])
    fused = rf.fuse(model)
    for value in (float("nan"), float("inf"), -float("inf"), 1e10):
        given = x.clone()
        given[(0, *(size // 2 for size in x.shape[1:]))] = value
        if value == 1e10:
            check(fused, model, given)
            continue
        for _ in range(2):
            got, want = fused(given), model(given)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())
            assert_same(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0))


@of_nets
@torch.no_grad()
def test_autocast(make, x, trained):
    model = trained(make())
    fused = rf.fuse(model)
    for _ in range(2):
        with torch.autocast(x.device.type, torch.bfloat16):
            got, want = fused(x), model(x)
        assert got.dtype == want.dtype == torch.bfloat16
        truth = copy.deepcopy(model).double()(x.double())
        assert (got - truth).norm() <= 2 * (want - truth).norm() + 2**-8 * truth.norm()
        check(fused, model, x)


@of_nets
def test_changes_are_followed_and_training_is_stocks(make, x, trained):
    model = trained(make())
    fused = rf.fuse(model)
    check(fused, model, x)
    for m in (model, fused):
        with torch.no_grad():
            m[0].weight.mul_(1.5)
            m[1].running_mean.add_(0.5)
    check(fused, model, x)
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for m in (model, fused):
        m.load_state_dict(state)
    check(fused, model, x)
    torch.manual_seed(0)
    want = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(fused.train()(x), want)
    want.sum().backward()
    fused.eval(), model.eval()
    check(fused, model, x)
    y = fused(x.clone().requires_grad_())
    assert y.requires_grad


@of_nets
@torch.no_grad()
def test_in_graphs(make, x, trained):
    model = trained(make())
    fused = rf.fuse(model)
    want = model(x)
    compiled = torch.compile(fused, backend="eager")
    assert_same(compiled(x), want)
    exported = torch.export.export(fused, (x,))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "resnet_fused.program.default" in targets
    assert_same(exported.module()(x), want)
    traced = torch.jit.trace(fused, x)
    assert_same(traced(x), want)
    assert_same(traced(x[:1]), model(x[:1]))


@of_nets
@torch.no_grad()
def test_released_weights(make, x, trained):
    model = trained(make())
    fused = rf.fuse(model, example_inputs=x, release=True)
    assert_same(fused(x), model(x))
    with pytest.raises(RuntimeError, match="release=True"):
        fused[0].weight.sum()


@of_nets
def test_other_backends(make, x, trained):
    model = trained(make())
    for backend in ("reference", "onednn", "cpu"):
        if backend in rf.available_backends():
            fused = rf.fuse(model, backend=backend)
            check(fused, model, x)
            assert counts(fused) == (1, 0)
            assert all(ops(fused))
    exact = rf.fuse(model, precision="exact")
    check(exact, model, x)


@torch.no_grad()
def test_stocks_own_kernels_without_views(trained, monkeypatch):
    """As on a GPU: folded weights, and everything else as stock has it."""
    from resnet_fused.runtime import program

    monkeypatch.setattr(program, "view_of", lambda conv: View.SAME)
    for make, x in NETS.values():
        model = trained(make())
        fused = rf.fuse(model)
        check(fused, model, x)
        assert all(ops(fused))


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_networks_for_videos(name, trained):
    from torchvision.models import video

    model = trained(getattr(video, name)())
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 8, 32, 32)
    check(fused, model, x)
    check(fused, model, x.contiguous(memory_format=torch.channels_last_3d))
    assert all(ops(fused))
    assert counts(fused) == (2, 0)
