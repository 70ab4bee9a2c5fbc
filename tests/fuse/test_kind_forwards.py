"""Forwards of one's own, put into modules before or after rf.fuse, and in subclasses of the blocks."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from support.kinds import Unit, assert_same, check, counts, ops, unit
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
