"""Parts of a fused model that someone else calls, and forwards that read attributes of their parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import nn

import resnet_fused as rf


def _net():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


class CallsStem(nn.Module):
    """Calls layers of a network as its own forward would."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, k=1.0):
        n = self.net
        return n.relu(n.bn1(n.conv1(x))) * k


class CallsStemAndPool(CallsStem):
    def forward(self, x, k=1.0):
        n = self.net
        return n.maxpool(n.relu(n.bn1(n.conv1(x)))) * k


class CallsTrunk(CallsStem):
    def forward(self, x, k=1.0):
        n = self.net
        x = n.maxpool(n.relu(n.bn1(n.conv1(x))))
        return n.layer2(n.layer1(x)) * k


class CallsParts(CallsStem):
    """Layers of a block, and the block itself."""

    def forward(self, x, k=1.0):
        block = self.net.layer1[0]
        x = self.net.conv1(x)
        return block(x) + block.bn1(block.conv1(x)) * k


class CallsStemUntraceably(CallsStem):
    def forward(self, x, k=1.0):
        n = self.net
        y = n.relu(n.bn1(n.conv1(x)))
        return y * k if y.sum() > 0 else -y


class CallsWhole(CallsStem):
    def forward(self, x, k=1.0):
        y = self.net(x)
        return y * k if float(y.sum()) > 0 else y - k


IMAGE = torch.randn(1, 3, 64, 64)
# whether the parent's own program serves, without an argument k
PARENTS = {
    "stem": (CallsStem, True),
    "stem-and-pool": (CallsStemAndPool, True),
    "trunk": (CallsTrunk, True),
    "parts-and-whole": (CallsParts, True),
    "untraceable": (CallsStemUntraceably, False),
    "whole": (CallsWhole, True),
}


@pytest.mark.parametrize("kind, served", PARENTS.values(), ids=PARENTS)
def test_a_parent_calls_parts_of_a_network(kind, served, trained):
    model = trained(kind(_net()))
    fused = rf.fuse(model)
    for _ in range(2):
        check(fused, model, IMAGE, served=served)
    with_blocks = kind in (CallsTrunk, CallsWhole, CallsParts)  # whose own fast paths serve
    check(fused, model, IMAGE, 0.5, served=with_blocks)
    check(fused, model, IMAGE, k=-2.0, served=with_blocks)


def test_a_network_of_torchvision_is_called_by_a_parent_and_alone(trained):
    model = trained(CallsStem(torchvision.models.resnet18(num_classes=5)))
    fused = rf.fuse(model)
    check(fused, model, IMAGE)
    with torch.no_grad():
        assert_same(fused.net(IMAGE), model.net(IMAGE))
    assert fused.net.forward.runs(), "the network's own path didn't serve"


@pytest.mark.parametrize("fuse_net", [True, False], ids=["net-fused-first", "parent-fused"])
def test_a_fused_network_inside_of_a_plain_parent(fuse_net, trained):
    model = trained(CallsTrunk(_net()))
    parent = CallsTrunk(rf.fuse(model.net)) if fuse_net else rf.fuse(model)
    parent.eval()
    with torch.no_grad():
        for k in (1.0, 0.5):
            assert_same(parent(IMAGE, k), model(IMAGE, k))
    assert parent.net.layer1.forward.runs(), "no fast path served"


# ---- containers of parts ---------------------------------------------------------------------------------------------


def _features():
    return nn.Sequential(*unit(3, 8), Unit(), nn.MaxPool2d(2), nn.Sequential(*unit()), rf.BasicBlock(8, 16, 2))


SLICES = {
    "head": lambda s: s[:3],
    "conv-and-bn": lambda s: s[:2],
    "up-to-a-module": lambda s: s[:4],
    "rest": lambda s: s[3:],
    "copied-list": lambda s: nn.Sequential(*list(s)[:5]),
    "children": lambda s: nn.Sequential(*s.children()),
    "joined": lambda s: s[:4] + s[4:],
}


@pytest.mark.parametrize("cut", SLICES.values(), ids=SLICES)
@torch.no_grad()
def test_slices_of_a_fused_sequential(cut, trained):
    model = trained(_features())
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 16, 16)
    check(fused, model, x)
    ours, stock = cut(fused).eval(), cut(model).eval()
    given = x if ours[0] is fused[0] else torch.randn(1, 8, 16, 16)
    for _ in range(2):
        assert_same(ours(given), stock(given))
    again = rf.fuse(ours)
    check(again, stock, given)
    assert any(ops(again))
    check(fused, model, x)


def _changed(change):
    def apply(s):
        change(s)
        return s

    return apply


CHANGES = {
    "appended": lambda s: s.append(nn.ReLU()),
    "replaced": _changed(lambda s: s.__setitem__(3, nn.Sigmoid())),
    "deleted": _changed(lambda s: s.__delitem__(4)),
    "inserted": lambda s: s.insert(3, nn.Tanh()),
    "conv-replaced": _changed(
        lambda s: s.__setitem__(0, s[0].__class__(3, 8, 3, padding=1).requires_grad_(False).apply(_ones))
    ),
}


@torch.no_grad()
def _ones(module: nn.Module) -> None:
    for p in module.parameters():
        p.fill_(0.1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_sequential_that_changes_after_a_call(change, trained):
    model = trained(_features())
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 16, 16)
    check(fused, model, x)
    change(model)
    change(fused)
    check(fused, model, x)
    check(fused, model, x)


class Taps(nn.Module):
    """Taps results in a loop over its parts."""

    def __init__(self, taps=(2, 3, 6)):
        super().__init__()
        self.features, self.taps = _features(), taps

    def forward(self, x):
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found


class TapsByName(Taps):
    def forward(self, x):
        found = {}
        for name, layer in self.features.named_children():
            x = layer(x)
            if int(name) in self.taps:
                found[name] = x
        return found


class TapsInList(nn.Module):
    def __init__(self, taps=(0, 2)):
        super().__init__()
        self.stages, self.taps = nn.ModuleList([nn.Sequential(*unit(3, 8)), Unit(), rf.BasicBlock(8, 8)]), taps

    def forward(self, x):
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return tuple(found[i] for i in self.taps)


@pytest.mark.parametrize("kind", [Taps, TapsByName, TapsInList])
@pytest.mark.parametrize("taps", [(2,), (0, 1, 2), (1,), (2, 0)], ids=str)
def test_loops_over_children_that_tap_results(kind, taps, trained):
    model = trained(kind(taps))
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 16, 16)
    for _ in range(2):
        check(fused, model, x)
    for m in (model, fused):
        m.taps = (1, 2)
    check(fused, model, x)


# ---- attributes that a forward reads -----------------------------------------------------------------------------------


class Transposed(Unit):
    def forward(self, x):
        return F.conv_transpose2d(self.relu(self.bn(self.conv(x))), self.conv.weight)


class Casts(Unit):
    @property
    def dtype(self):
        return self.conv.weight.dtype

    def forward(self, x):
        return self.relu(self.bn(self.conv(x.to(self.dtype))))


class Scales(Unit):
    """Uses the batch norm's parameters beside the batch norm."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.bn.weight.view(1, -1, 1, 1) + self.bn.running_mean[None, :, None, None]


class Regularizes(Unit):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))), self.conv.weight.square().sum()


class Asks(Unit):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y / self.conv.out_channels if self.conv.stride == (1, 1) and self.bn.eps < 1 else y


READERS = {"transposed": Transposed, "dtype": Casts, "bn-weight": Scales, "norm-of-weight": Regularizes, "geometry": Asks}


@pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attributes_that_are_read_in_forward(kind, dtype, trained):
    model = trained(nn.Sequential(*unit(), kind())).to(dtype)
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 7, 7, dtype=dtype)
    for _ in range(2):
        check(fused, model, x)
    for m in (model, fused):
        with torch.no_grad():
            m[3].conv.weight.mul_(1.5)
            m[3].bn.weight.add_(0.25)
            m[3].bn.running_mean.add_(0.25)
    check(fused, model, x)
    assert all(ops(fused))
    assert counts(fused) == (3, 0)


def test_an_attribute_of_a_part_that_changes_its_forward(trained):
    model = trained(Asks())
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 7, 7)
    check(fused, model, x)
    for m in (model, fused):
        m.conv.stride = (2, 2)
    check(fused, model, x)
    for m in (model, fused):
        m.bn.eps = 2.0
    check(fused, model, x)
