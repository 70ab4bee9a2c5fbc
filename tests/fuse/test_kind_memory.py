"""Forwards that remember something at every call, and those that read what changes between calls."""

from __future__ import annotations

import types

import pytest
import torch
from support.kinds import Unit, assert_same, counts, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 7, 7)


SEEN: list[object] = []
FACTOR = 1.0
LIMITS = [1.0]


class Appends(Unit):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        self.seen.append(y.shape)
        return y


class AppendsTensors(Appends):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        self.seen.append(y)
        return y


class Keeps(Unit):
    def forward(self, x):
        self.last = self.relu(self.bn(self.conv(x)))
        return self.last


class KeepsInDict(Unit):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        self.seen["last"] = y.shape
        return y


class KeepsGlobally(Unit):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        SEEN.append(tuple(y.shape))
        return y


class Counts(Unit):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.conv(x))) * self.calls


class CountsInBuffer(Unit):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.conv(x))) * self.calls


REMEMBERING = (Appends, AppendsTensors, Keeps, KeepsInDict, KeepsGlobally, Counts, CountsInBuffer)
REMEMBERED = ("seen", "last", "calls")


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(*unit(), m)], ids=["root", "part"])
@pytest.mark.parametrize("kind", REMEMBERING)
@torch.no_grad()
def test_forwards_that_remember_do_so_at_every_call(kind, around, trained):
    model = trained(around(kind()))
    fused = rf.fuse(model)
    results = []
    for m in (model, fused):
        SEEN.clear()
        own = [m(X), m(X[:1]), m(X)]
        part = m if isinstance(m, kind) else m[-1]
        results.append((own, {name: getattr(part, name) for name in REMEMBERED if hasattr(part, name)}, [*SEEN]))
    assert_same(results[1], results[0])
    assert counts(fused)[0] == (0 if isinstance(fused, kind) else 3)


# ---- what a forward reads from outside ---------------------------------------------------------------------------------


class ReadsGlobal(Unit):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * FACTOR


class ReadsGlobalList(Unit):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * LIMITS[0]


class ReadsClass(Unit):
    factor = 1.0

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.factor


class ReadsClassByName(ReadsClass):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * ReadsClassByName.factor


class ReadsBase(ReadsClass):
    pass


class ReadsClassList(Unit):
    factors = [1.0]  # noqa: RUF012

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.factors[0]


class ReadsAttribute(Unit):
    def __init__(self):
        super().__init__()
        self.config = {"scale": 1.0, "deep": [types.SimpleNamespace(value=1.0)]}

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.config["scale"] * self.config["deep"][0].value


CHANGES = {
    "global": (ReadsGlobal, lambda patch, *models: patch.setitem(globals(), "FACTOR", 3.0)),
    "global-list": (ReadsGlobalList, lambda patch, *models: LIMITS.__setitem__(0, 3.0)),
    "class": (ReadsClass, lambda patch, *models: patch.setattr(ReadsClass, "factor", 3.0)),
    "base-class": (ReadsClassByName, lambda patch, *models: patch.setattr(ReadsClass, "factor", 3.0)),
    "subclass": (ReadsClassByName, lambda patch, *models: patch.setattr(ReadsClassByName, "factor", 3.0, raising=False)),
    "subclass-of-self": (ReadsBase, lambda patch, *models: patch.setattr(ReadsBase, "factor", 3.0, raising=False)),
    "class-list": (ReadsClassList, lambda patch, *models: ReadsClassList.factors.__setitem__(0, 3.0)),
    "attribute": (ReadsAttribute, lambda patch, *models: [m.config.update(scale=3.0) for m in models]),
    "deep-attribute": (ReadsAttribute, lambda patch, *models: [setattr(m.config["deep"][0], "value", 3.0) for m in models]),
    "new-attribute": (ReadsClass, lambda patch, *models: [setattr(m, "factor", 3.0) for m in models]),
    "mode": (Unit, lambda patch, *models: [setattr(m, "relu", nn.Hardtanh()) for m in models]),
}


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(*unit(), m)], ids=["root", "part"])
@pytest.mark.parametrize("kind, change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_a_forward_reads_changes_later(kind, change, around, trained, monkeypatch):
    LIMITS[0] = ReadsClassList.factors[0] = 1.0
    model = trained(around(kind()))
    fused = rf.fuse(model)
    for _ in range(2):
        before = fused(X)
        assert_same(before, model(X))
    change(monkeypatch, *(m if isinstance(m, kind) else m[-1] for m in (model, fused)))
    assert not torch.equal(model(X), before)
    for _ in range(2):
        assert_same(fused(X), model(X))
    if isinstance(fused, nn.Sequential) or kind is not ReadsGlobalList:
        assert counts(fused)[0] >= 2
