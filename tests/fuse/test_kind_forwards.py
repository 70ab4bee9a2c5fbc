"""Forwards of one's own, put into modules before or after rf.fuse, and those that remember or read what changes."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from kinds import Unit, assert_same, check, counts, ops, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 7, 7)


def doubled(self, x):
    return self.relu(self.bn(self.conv(x))) * 2


def negated(self, x):
    return -self.bn(self.conv(x))


def _net() -> nn.Module:
    return nn.Sequential(*unit(), Unit())


def _part(m):
    return m[3]


def _root(m):
    return m


PLACES = {"part": (_net, _part), "root": (Unit, _root)}


@pytest.mark.parametrize("make, get", PLACES.values(), ids=PLACES)
def test_a_method_that_was_put_into_the_instance_before(make, get, trained):
    model = trained(make())
    get(model).forward = types.MethodType(doubled, get(model))
    fused = rf.fuse(model)
    for _ in range(2):
        check(fused, model, X)
    assert all(ops(fused))
    rf.unfuse(fused)
    assert get(fused).forward.__func__ is doubled
    with torch.no_grad():
        assert torch.equal(fused(X), model(X))


@pytest.mark.parametrize("make, get", PLACES.values(), ids=PLACES)
@torch.no_grad()
def test_a_method_that_was_put_into_the_instance_afterwards(make, get, trained):
    model = trained(make())
    fused = rf.fuse(model)
    for forward in (doubled, negated):
        assert_same(fused(X), model(X))
        for m in (model, fused):
            get(m).forward = types.MethodType(forward, get(m))
        for _ in range(2):
            assert_same(fused(X), model(X))
    if get is _part:
        assert counts(fused)[0] > 2, "the rest of the model isn't served any more"


def _lambda(m):
    previous = m.forward
    m.forward = lambda *args, **kwargs: previous(*args, **kwargs) + 1


def _around(self, *args):
    return self.own_forward(*args) * 2


def _saved(m):
    """As accelerate and peft do it."""
    m.own_forward = m.forward
    m.forward = types.MethodType(_around, m)


def _partial(m):
    m.own_forward = m.forward
    m.forward = functools.update_wrapper(functools.partial(_around, m), m.own_forward)


def _of_class(self, x):
    return type(self).forward(self, x) * 2


def _class_method(m):
    m.forward = types.MethodType(_of_class, m)


WRAPPERS = {"lambda": _lambda, "saved": _saved, "partial": _partial, "class-method": _class_method}
WRAPPED = {
    **PLACES,
    "block": (lambda: rf.BasicBlock(8, 8), _root),
    "block-part": (lambda: nn.Sequential(*unit(), rf.BasicBlock(8, 8)), _part),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make, get", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("called", [True, False], ids=["called-before", "not-called"])
@torch.no_grad()
def test_a_function_around_the_present_forward(make, get, wrap, called, trained):
    model = trained(make())
    fused = rf.fuse(model)
    if called:
        assert_same(fused(X), model(X))
    for m in (model, fused):
        wrap(get(m))
    for _ in range(3):
        assert_same(fused(X), model(X))
    rf.unfuse(fused)
    assert_same(fused(X), model(X))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_a_function_around_the_forward_of_a_model_with_parts(wrap, trained):
    model = trained(nn.Sequential(Unit(), Unit()))
    fused = rf.fuse(model)
    fused(X)
    for m in (model, fused):
        wrap(m)
    parts = [m.forward for m in fused.children()]
    for _ in range(2):
        assert_same(fused(X), model(X))
    served = all(path.runs() for path in parts)
    assert served or wrap is _class_method, "the parts' fast paths don't serve"


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make, get", WRAPPED.values(), ids=WRAPPED)
@torch.no_grad()
def test_a_function_around_the_forward_before(make, get, wrap, trained):
    model = trained(make())
    state = model.state_dict()
    stock = make().eval()
    stock.load_state_dict(state)
    for m in (model, stock):
        wrap(get(m))
    fused = rf.fuse(model, inplace=True)
    for _ in range(2):
        assert_same(fused(X), stock(X))
    rf.unfuse(fused)
    assert_same(fused(X), stock(X))


@torch.no_grad()
def test_a_forward_put_into_the_class_afterwards(trained, monkeypatch):
    model = trained(_net())
    fused = rf.fuse(model)
    check(fused, model, X)
    monkeypatch.setattr(Unit, "forward", doubled)
    check(fused, model, X)
    monkeypatch.undo()
    check(fused, model, X)


# ---- subclasses of the blocks ------------------------------------------------------------------------------------------


class OwnForward(rf.BasicBlock):
    def forward(self, x):
        return self.bn1(self.conv1(x)) * 0.5


class AroundForward(rf.BasicBlock):
    def forward(self, x):
        return super().forward(x) + x


class OwnBottleneck(rf.Bottleneck):
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return torch.sigmoid(self.bn3(self.conv3(y))) * x


BLOCKS = {
    "own": lambda: OwnForward(8, 8),
    "around": lambda: AroundForward(8, 8),
    "bottleneck": lambda: OwnBottleneck(8, 2),
    "in-a-model": lambda: nn.Sequential(*unit(), OwnForward(8, 8), AroundForward(8, 8)),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_subclasses_of_the_blocks_with_a_forward_of_their_own(make, trained):
    model = trained(make())
    fused = rf.fuse(model)
    for _ in range(2):
        check(fused, model, X)
    with torch.no_grad():
        alone = make().eval()
        alone.load_state_dict(model.state_dict())
        assert_same(alone(X), model(X))


# ---- forwards that remember --------------------------------------------------------------------------------------------

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
