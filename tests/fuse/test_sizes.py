"""Forwards that decide by the size of their input: a trace for each size."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from support.kinds import Unit, assert_same, check, counts, ops, outcome, unit
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion import traces


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, by its input's size; as timm's Conv2dSame."""

    def _amount(self, size, place):
        if isinstance(size, torch.Tensor):
            size = int(size)
        kernel, stride = self.kernel_size[place], self.stride[place]
        return max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)

    def forward(self, x):
        h, w = x.size()[-2:]
        down, right = self._amount(h, 0), self._amount(w, 1)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = SamePadding(8, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Classifier(nn.Module):
    """As timm's ConvMlp of VGG: pools images that are smaller than its filter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.size = nn.Conv2d(8, 8, 5), nn.ReLU(), 5

    def forward(self, x):
        if x.shape[-2] < self.size or x.shape[-1] < self.size:
            x = F.adaptive_avg_pool2d(x, (max(self.size, x.shape[-2]), max(self.size, x.shape[-1])))
        return self.act(self.conv(x))


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.other = Unit(), Unit()

    def forward(self, x):
        return self.unit(x) if len(x) == 1 else self.other(x)


class Looping(nn.Module):
    """Loops over images, and over groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.mixing = Unit(), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        y = torch.stack([image * 2 for image in self.unit(x)])
        return torch.cat([self.mixing(y[:, i : i + 2]) for i in range(0, y.shape[1], 2)], 1)


class Counting(nn.Module):
    """Gives numbers beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x):
        y = self.unit(x)
        return {"y": y, "size": y.shape, "pixels": int(y.shape[-1] * y.size(2)), "many": y.numel() > 100 and y.ndim == 4}


class Unfolding(nn.Module):
    """As timm's MobileViT blocks: resizes images whose size isn't a multiple of a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.last = Unit(), Unit()

    def forward(self, x):
        y = self.unit(x)
        n, c, h, w = y.shape
        height, width = math.ceil(h / 4) * 4, math.ceil(w / 4) * 4
        if (height, width) != (h, w):
            y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        y = y.reshape(n * c, height // 4, 4, width // 4, 4).amax((2, 4)).reshape(n, c, height // 4, width // 4)
        return self.last(y)


KINDS = {
    "same-padding": (Padded, 1),
    "parts": (lambda: nn.Sequential(*unit(), Padded(), Unit()), 3),
    "classifier": (lambda: nn.Sequential(*unit(), Classifier()), 2),
    "batch": (ByBatch, 1),
    "loops": (Looping, 2),
    "numbers": (Counting, 1),
    "patches": (Unfolding, 2),
}
SIZES = [(1, 8, 9, 8), (2, 8, 9, 8), (1, 8, 4, 4), (1, 8, 16, 12), (1, 8, 9, 8)]


@pytest.mark.parametrize(("make", "fused_at_least"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
def test_each_size(make, fused_at_least, format, trained):
    model = trained(make())
    fused = rf.fuse(model)
    for number, size in enumerate(SIZES):
        x = torch.randn(size).contiguous(memory_format=format)
        for _ in range(3):
            before = counts(fused)[0]
            check_results(fused, model, x)
            served = counts(fused)[0] > before
        assert served
        if number == 0:
            assert sum(map(bool, ops(fused))) >= fused_at_least


@torch.no_grad()
def check_results(fused, model, *args, **kwargs):
    assert_same(fused(*args, **kwargs), model(*args, **kwargs))


def test_the_whole_model_is_one_program_for_a_size(trained):
    model = trained(nn.Sequential(*unit(), Padded(), Classifier()))
    fused, x = rf.fuse(model), torch.randn(1, 8, 9, 8)
    assert "" in ops(fused)
    check(fused, model, x)
    assert all(ops(fused))
    (run,) = fused.forward.runs()
    assert len(run.problems) == 3


def test_sizes_that_come_once_are_not_traced(trained, monkeypatch):
    model = trained(Padded())
    fused = rf.fuse(model)
    made = []
    build = traces.build
    monkeypatch.setattr(traces, "build", lambda *args: made.append(args) or build(*args))
    for size in range(5, 30):
        check_results(fused, model, torch.randn(1, 8, size, size))
    assert len([args for args in made if args[0] is fused and args[2] is not None]) == 1
    for _ in range(2):
        check_results(fused, model, torch.randn(1, 8, 7, 7))
    assert len([args for args in made if args[0] is fused and args[2] is not None]) == 2
    for size in range(5, 30):
        for _ in range(3):
            check_results(fused, model, torch.randn(1, 8, size, size))
    assert len([args for args in made if args[0] is fused and args[2] is not None]) <= traces._MOST_SIZES


def _change_attribute(m):
    m[1].conv.stride = (1, 1)


def _hook(m):
    m[1].act.register_forward_hook(lambda module, args, y: y * 2)


def _weights(m):
    with torch.no_grad():
        m[1].conv.weight.mul_(-1.5)


def _other_layer(m):
    m[1].conv = SamePadding(8, 8, 5, 1)
    with torch.no_grad():
        m[1].conv.weight.fill_(0.01), m[1].conv.bias.fill_(0.1)


CHANGES = {
    "attribute": _change_attribute,
    "hook": _hook,
    "weights": _weights,
    "layer": _other_layer,
    "training": lambda m: m[1].bn.train(),
    "cast": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_are_followed(change, trained):
    model = trained(nn.Sequential(Unit(), Padded()))
    fused = rf.fuse(model)
    for size in (9, 8, 9):
        for _ in range(2):
            check_results(fused, model, torch.randn(1, 8, size, size))
    change(model), change(fused)
    dtype = next(model.parameters()).dtype
    for size in (9, 8, 9, 10):
        for _ in range(3):
            x = torch.randn(1, 8, size, size, dtype=dtype)
            assert_same(fused(x), model(x))
    assert_same({**fused.state_dict()}, {**model.state_dict()})


def test_a_value_decides_beside_a_size(trained):
    class ByValue(Padded):
        def forward(self, x):
            if x.shape[-1] > 4 and float(x.mean()) > 0:
                return super().forward(x)
            return x

    model = trained(ByValue())
    fused = rf.fuse(model)
    for x in (torch.rand(1, 8, 9, 9), -torch.rand(1, 8, 9, 9)):
        for _ in range(2):
            check_results(fused, model, x)


def test_a_module_that_is_no_layer_and_whose_size_nobody_knows(trained):
    class Halving(nn.Module):
        """Not traced: it remembers. Its result has another size than its input."""

        def forward(self, x):
            self.last = x.shape
            return x[..., ::2, ::2]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit, self.halving, self.padded = Unit(), Halving(), Padded()

        def forward(self, x):
            return self.padded(self.halving(self.unit(x)))

    model = trained(Net())
    fused = rf.fuse(model)
    for size in (16, 9, 16):
        for _ in range(3):
            check_results(fused, model, torch.randn(1, 8, size, size))
            assert fused.halving.last == model.halving.last


def test_calls_by_name_and_with_what_is_optional(trained):
    class Net(Padded):
        def forward(self, x, scale=2.0):
            return super().forward(x) * scale

    model = trained(Net())
    fused, x = rf.fuse(model), torch.randn(1, 8, 9, 9)
    for _ in range(2):
        check_results(fused, model, x=x)
        assert counts(fused)[1] == 0
    check_results(fused, model, x, 3.0)
    check_results(fused, model, x=x, scale=torch.tensor(0.5))
    check_results(fused, model, x)


@torch.no_grad()
def test_errors_are_stocks(trained):
    model = trained(Classifier())
    fused = rf.fuse(model)
    check_results(fused, model, torch.randn(1, 8, 9, 9))
    for x in (torch.randn(1, 7, 9, 9), torch.randn(9), torch.randn(0, 8, 9, 9), torch.randn(8, 9, 9)):
        for _ in range(2):
            want, got = outcome(model, (x,), {}), outcome(fused, (x,), {})
            if isinstance(want, Exception):
                assert (type(got), str(got)) == (type(want), str(want))
            else:
                assert_same(got, want)


@torch.no_grad()
def test_in_graphs(trained):
    model = trained(nn.Sequential(*unit(), Padded()))
    fused, x = rf.fuse(model), torch.randn(1, 8, 9, 9)
    for called in (False, True):
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        for size in (9, 12):
            given = torch.randn(1, 8, size, size)
            assert_same(compiled(given), model(given))
        assert_same(torch.export.export(fused, (x,)).module()(x), model(x))
        assert_same(torch.jit.trace(fused, x)(x), model(x))
        if not called:
            check_results(fused, model, x)


def test_the_report_tells_of_the_last_size(trained):
    model = trained(Padded())
    fused = rf.fuse(model)
    (row,) = rf.report(fused, file=io.StringIO()).rows
    assert row.note.endswith("which the sizes of a call may tell")
    check_results(fused, model, torch.randn(1, 8, 9, 9))
    (row,) = rf.report(fused, file=io.StringIO()).rows
    assert (row.op, row.note) == ("conv2d_bn_relu", "")
    assert row.backends


@torch.no_grad()
def test_released_weights(trained):
    model, x = trained(nn.Sequential(*unit(), Padded())), torch.randn(1, 8, 9, 9)
    fused = rf.fuse(model, example_inputs=x, release=True)
    assert_same(fused(x), model(x))
