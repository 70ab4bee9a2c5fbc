"""Batch norms that follow no convolution: after a sum, a concatenation or a pool they are one pass with what follows them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import needs_kernels, rows, runs, served
from support.kinds import check, check_comes_back
from torch import nn

import resnet_fused as rf

pytestmark = pytest.mark.cpu
CL = torch.channels_last
X = torch.randn(2, 16, 9, 7)


class Preactivated(nn.Module):
    """A block whose batch norms and ReLUs come before the convolutions."""

    def __init__(self, inputs: int = 16, outputs: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(inputs, 8, 1, bias=False), nn.Conv2d(8, outputs, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x):
        y = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        return self.conv2(self.act(self.norm2(self.conv1(y)))) + shortcut


class Dense(nn.Module):
    """Layers that read all results before them."""

    def __init__(self, layers: int = 4, cat=lambda parts: torch.cat(parts, 1)) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 5 * i) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 5 * i, 5, 3, padding=1, bias=False) for i in range(layers))
        self.cat, self.last = cat, nn.BatchNorm2d(16 + 5 * layers)

    def forward(self, x):
        found = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            found.append(conv(F.relu(norm(self.cat(found)))))
        return self.last(self.cat(found))


class After(nn.Module):
    """A convolution, something, a batch norm and what follows."""

    def __init__(self, between, norm: nn.Module | None = None, follows=F.relu) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), norm if norm is not None else nn.BatchNorm2d(16)
        self.between, self.follows = between, follows

    def forward(self, x):
        return self.follows(self.norm(self.between(self.conv(x), x)))


def passes(fused: nn.Module) -> list[str]:
    """Ops that our kernels served beside convolutions."""
    return [op for op, backend in served(fused) if "affine" in op and backend == "cpu"]


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_preactivated_blocks(dtype, layout, trained):
    """The batch norm at the beginning reads a contiguous input as it is; all others are passes, in one native call."""
    model = trained(nn.Sequential(nn.Conv2d(16, 16, 1), Preactivated(), Preactivated(16, 24), Preactivated(24, 24))).to(dtype)
    fused = rf.fuse(model)
    for x in (X, X[:1], torch.randn(8, 16, 4, 4)):
        check(fused, model, x.to(dtype).contiguous(memory_format=layout))
    assert passes(fused) == 3 * 3 * ["affine_relu"]
    assert all(sum(bool(operation.several) for operation in run.operations) == 1 for run in runs(fused))


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_blocks(dtype, layout, trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Dense())).to(dtype)
    fused = rf.fuse(model)
    for x in (torch.randn(2, 3, 9, 7), torch.randn(1, 3, 14, 14)):
        check(fused, model, x.to(dtype).contiguous(memory_format=layout))
    assert passes(fused) == 2 * ["affine_relu", *3 * ["cat_affine_relu"], "cat_affine"]


CONCATENATIONS = {
    "a tuple": lambda parts: torch.cat(tuple(parts), 1),
    "by name": lambda parts: torch.cat(tensors=parts, dim=1),
    "from the end": lambda parts: torch.concat(parts, -3),
}
OTHERS = {
    "rows": lambda parts: torch.cat([p[:, :, :1] for p in parts], 1),
    "read again": lambda parts: (lambda y: y + y.mean())(torch.cat(parts, 1)),
}


@needs_kernels
@pytest.mark.parametrize("cat", CONCATENATIONS.values(), ids=CONCATENATIONS)
def test_every_spelling_of_a_concatenation(cat, trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Dense(2, cat)))
    fused = rf.fuse(model)
    check(fused, model, torch.randn(2, 3, 9, 7))
    assert passes(fused) == ["affine_relu", "cat_affine_relu", "cat_affine"]


@pytest.mark.parametrize("cat", OTHERS.values(), ids=OTHERS)
def test_other_concatenations_keep_their_meaning(cat, trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Dense(1, cat)))
    fused = rf.fuse(model)
    for x in (torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7).contiguous(memory_format=CL)):
        check(fused, model, x)


BETWEEN = {
    "a sum": lambda y, x: y + x,
    "a pool": lambda y, x: F.avg_pool2d(y, 2),
    "a max-pool": lambda y, x: F.max_pool2d(y, 3, 2, 1),
    "a function": lambda y, x: F.silu(y),
    "a slice": lambda y, x: y[:, :, 1:],
    "one image": lambda y, x: y[:1],
    "a transposition": lambda y, x: y.transpose(2, 3),
    "one pixel": lambda y, x: F.adaptive_avg_pool2d(y, 1),
    "one column": lambda y, x: y[..., :1],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_comes_before(between, layout, trained):
    model = trained(After(between))
    fused = rf.fuse(model)
    for _ in range(2):
        check(fused, model, X.contiguous(memory_format=layout))


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
def test_of_the_input(layout, trained):
    model = trained(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)))
    fused = rf.fuse(model)
    check(fused, model, X.contiguous(memory_format=layout))
    # A contiguous input is not converted for it.
    assert passes(fused) == (["affine_relu"] if layout == CL else [])


FOLLOWING = {
    "nothing": (lambda y: y, "affine"),
    "leaky ReLU": (lambda y: F.leaky_relu(y, 0.2), "affine_leaky_relu"),
    "in place": (lambda y: y.relu_(), "affine_relu"),
    "GELU": (F.gelu, "affine_gelu"),
    "two readers": (lambda y: F.relu(y) + y, "affine"),
}


@needs_kernels
@pytest.mark.parametrize("follows, op", FOLLOWING.values(), ids=FOLLOWING)
def test_what_follows(follows, op, trained):
    model = trained(After(BETWEEN["a sum"], follows=follows))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert passes(fused) == [op]


@needs_kernels
def test_a_sum_with_a_batch_norm(trained):
    """As in RepVGG: convolutions and a batch norm of the same value, summed up in place."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm, self.identity = (
                *(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, bias=False)),
                *(nn.BatchNorm2d(16), nn.BatchNorm2d(16)),
            )

        def forward(self, x):
            x = self.first(x)
            other = self.identity(x)
            y = self.norm(self.conv(x))
            y += other
            return F.relu(y)

    model = trained(Branches())
    fused = rf.fuse(model)
    check(fused, model, X)
    assert passes(fused) in (["affine"], ["affine_add_relu"])


NORMS = {
    "no parameters": lambda: nn.BatchNorm2d(16, affine=False),
    "large eps": lambda: nn.BatchNorm2d(16, eps=0.5),
    "synchronised": lambda: nn.SyncBatchNorm(16),
}


@needs_kernels
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_kinds_of_batch_norms(norm, trained):
    model = trained(After(BETWEEN["a sum"], norm()))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert passes(fused) == ["affine_relu"]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_far_from_zero(dtype):
    """x · scale + shift cancels there; the error is to be no more than twice stock's all the same."""
    model = After(lambda y, x: y + x).eval()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.zero_()
        model.norm.running_mean.uniform_(-1e4, 1e4)
        model.norm.running_var.uniform_(1e-4, 1e-2)
    x = model.norm.running_mean[:, None, None] + torch.randn(2, 16, 20, 20) * model.norm.running_var.sqrt()[:, None, None]
    fused, model = rf.fuse(model.to(dtype)), model.to(dtype)
    check(fused, model, x.to(dtype))
    assert passes(fused) == ["affine_relu"]


def test_other_batch_norms_are_stocks(trained):
    class Frozen(nn.Module):
        """As detectron2's."""

        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(16) + 0.5)
            self.eps = 1e-5

        def forward(self, x):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    Frozen.__name__ = "FrozenBatchNorm2d"
    for norm, training in (
        (Frozen(), False),
        (nn.BatchNorm2d(16, track_running_stats=False), False),
        (nn.BatchNorm2d(16), True),
    ):
        model = trained(After(BETWEEN["a sum"], norm))
        norm.train(training)
        fused = rf.fuse(model)
        check(fused, model, X)
        assert passes(fused) == []


@needs_kernels
@torch.no_grad()
def test_changes_are_noticed(trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 1), Dense(2)))
    fused, x = rf.fuse(model), torch.randn(2, 3, 9, 7)
    check(fused, model, x)
    changes = (
        lambda m: m[1].last.weight.mul_(3),
        lambda m: m[1].norms[0].running_mean.add_(1),
        lambda m: m[1].norms[1].running_var.data.mul_(4),
        lambda m: setattr(m[1].norms[0], "eps", 0.3),
        lambda m: setattr(m[1].last, "bias", nn.Parameter(torch.ones(26))),
    )
    for change in changes:
        change(model)
        change(fused)
        check_comes_back(fused, model, x)
    for m in (model, fused):
        m[1].last.train()
        m[1].last.momentum = 0.0
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_batch_norm_with_a_hook_is_called(trained):
    model, seen = trained(After(BETWEEN["a sum"])), []
    model.norm.register_forward_hook(lambda module, args, y: seen.append(y.shape) or 2 * y)
    fused = rf.fuse(model)
    check(fused, model, X)
    assert len(seen) >= 2
    assert passes(fused) == []


@needs_kernels
@torch.no_grad()
def test_nan_and_infinity_are_where_stock_has_them(trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 1), Dense()))
    fused, x = rf.fuse(model, precision="direct"), torch.randn(2, 3, 9, 7)
    x[0, 1, 2, 3], x[1, 0, 4, 4] = math.nan, math.inf
    got, want = fused(x), model(x)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)


@needs_kernels
@torch.no_grad()
def test_values_that_winograd_declines_are_stocks(trained):
    """Where one kernel of a row declines its input, all of the row is stock's."""
    wide = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), Preactivated(32, 32), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
    )
    model = trained(wide)
    fused, x = rf.fuse(model), torch.randn(1, 32, 40, 40)
    check(fused, model, x)
    x[0, 0, 0, 0] = 1e10
    check(fused, model, x)
    assert any(run.declined for run in runs(fused))


@pytest.mark.parametrize("chosen", ["reference", "onednn"])
def test_another_backend_leaves_them_to_stock(chosen, trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 1), Dense(2), nn.Conv2d(26, 16, 1), Preactivated()))
    fused = rf.fuse(model)
    with rf.use_backend(chosen):
        check(fused, model, torch.randn(2, 3, 9, 7))
    assert passes(fused) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
def test_through_the_compiler(layout, trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 1), Dense(2), nn.Conv2d(26, 16, 1), Preactivated()))
    fused, x = rf.fuse(model), torch.randn(2, 3, 9, 7).contiguous(memory_format=layout)
    with torch.no_grad():
        fused(x)
        got, want = torch.compile(fused, fullgraph=True)(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()


def test_the_report_has_a_row_for_each_convolution_and_none_for_passes(trained):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 1), Dense(2)))
    fused = rf.fuse(model)
    check(fused, model, torch.randn(2, 3, 9, 7))
    assert [row.conv for row in rows(fused)] == ["0", "1.convs.0", "1.convs.1"]
    assert all(row.op for row in rows(fused))


def test_a_network_without_convolutions_is_left_alone(trained):
    model = trained(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()))
    check(rf.fuse(model), model, X, served=False)
