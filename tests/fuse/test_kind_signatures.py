"""What a module takes and gives: results in containers, arguments by keyword, optional and unused ones."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import NamedTuple

import pytest
import torch
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import Tensor, nn

import resnet_fused as rf

Pair = namedtuple("Pair", ["features", "mean"])


class Typed(NamedTuple):
    features: Tensor
    count: int = 3


@dataclasses.dataclass
class Output:
    features: Tensor
    names: tuple[str, ...] = ("a", "b")
    extra: Tensor | None = None


class GivesDict(Unit):
    def forward(self, x):
        return {"out": super().forward(x)}


class GivesTuple(Unit):
    def forward(self, x):
        y = super().forward(x)
        return y, y.mean()


class GivesList(Unit):
    def forward(self, x):
        y = super().forward(x)
        return [y, x]


class GivesNamedTuple(Unit):
    def forward(self, x):
        y = super().forward(x)
        return Pair(y, y.mean((2, 3)))


class GivesTyped(Unit):
    def forward(self, x):
        return Typed(super().forward(x))


class GivesDataclass(Unit):
    def forward(self, x):
        return Output(super().forward(x), extra=x)


class GivesOrderedDict(Unit):
    def forward(self, x):
        found = OrderedDict()
        found["b"] = self.relu(self.bn(self.conv(x)))
        found["a"] = x
        return found


class GivesNested(Unit):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return {"all": [(y, None), {"deep": Pair(y, "text")}], "n": 3, "again": y}


class GivesNothing(Unit):
    def forward(self, x):
        self.relu(self.bn(self.conv(x)))


GIVING = (GivesDict, GivesTuple, GivesList, GivesNamedTuple, GivesTyped, GivesDataclass, GivesOrderedDict, GivesNested)


class Outer(nn.Module):
    """Hands on what a part gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner = nn.Sequential(*unit()), inner

    def forward(self, x):
        return self.inner(self.stem(x))


PLACES = {"root": lambda m: m, "part": Outer, "in-sequential": lambda m: nn.Sequential(*unit(), m)}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", GIVING, ids=lambda kind: kind.__name__)
def test_results_in_containers(kind, place, trained):
    model = trained(place(kind()))
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 6, 6)
    first = check(fused, model, x)
    second = check(fused, model, x)
    assert type(first) is type(second)
    if isinstance(first, (dict, list)):
        assert first is not second, "calls share a container"
        first.clear()
        check(fused, model, x)
    assert all(ops(fused))


def test_tensors_that_are_one_in_the_result_are_one_in_ours(trained):
    model = trained(GivesNested())
    with torch.no_grad():
        got = rf.fuse(model)(torch.randn(2, 8, 6, 6))
    assert got["again"] is got["all"][0][0] is got["all"][1]["deep"].features


def test_a_result_that_is_the_input_is_the_input(trained):
    model, x = trained(GivesList()), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert rf.fuse(model)(x)[1] is x


def test_no_result(trained):
    model = trained(GivesNothing())
    fused = rf.fuse(model)
    with torch.no_grad():
        assert fused(torch.randn(1, 8, 6, 6)) is None


# ---- arguments -------------------------------------------------------------------------------------------------------


class Unused(Unit):
    def forward(self, x, y):
        return super().forward(x)


class Optional(Unit):
    def forward(self, x, mask=None, scale=1.0):
        y = self.relu(self.bn(self.conv(x))) * scale
        return y if mask is None else y * mask


class KeywordOnly(Unit):
    def forward(self, x, *, scale=2.0):
        return self.relu(self.bn(self.conv(x))) * scale


class Rest(Unit):
    def forward(self, x, *args, **kwargs):
        y = self.relu(self.bn(self.conv(x)))
        return (y, *args, kwargs.get("z"))


class TwoImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Unit(), Unit()

    def forward(self, left, right):
        return self.a(left) + self.b(right)


X, Y = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
# module, arguments, keywords, whether a fast path serves
CALLS = {
    "keyword": (Unit, (), {"x": X}, True),
    "unused": (Unused, (X, Y), {}, True),
    "unused-by-keyword": (Unused, (X,), {"y": Y}, True),
    "all-by-keyword": (Unused, (), {"y": Y, "x": X}, True),
    "unused-none": (Unused, (X, None), {}, False),
    "optional-not-given": (Optional, (X,), {}, True),
    "optional-given": (Optional, (X, Y), {}, False),
    "optional-by-keyword": (Optional, (X,), {"mask": Y}, False),
    "optional-none": (Optional, (X, None), {}, False),
    "optional-number": (Optional, (X,), {"scale": 3.0}, False),
    "keyword-only-not-given": (KeywordOnly, (X,), {}, True),
    "keyword-only": (KeywordOnly, (X,), {"scale": 0.5}, False),
    "rest-not-given": (Rest, (X,), {}, True),
    "rest": (Rest, (X, Y), {}, False),
    "rest-by-keyword": (Rest, (X,), {"z": Y}, False),
    "two-images": (TwoImages, (X, Y), {}, True),
    "two-images-by-keyword": (TwoImages, (), {"right": X, "left": Y}, True),
    "two-images-exchanged": (TwoImages, (X,), {"right": X[:, :, :5, :5]}, None),
    "too-many": (Unit, (X, Y), {}, None),
    "too-few": (Unused, (X,), {}, None),
    "unknown-keyword": (Unit, (X,), {"z": Y}, None),
    "a-list": (Unit, ([X],), {}, None),
    "an-int": (Unit, (3,), {}, None),
    "wrong-channels": (Unit, (X[:, :3],), {}, None),
    "wrong-dtype": (Unit, (X.double(),), {}, None),
    "two-dimensions": (Unit, (X[0, 0],), {}, None),
}


@pytest.mark.parametrize("kind, args, kwargs, served", CALLS.values(), ids=CALLS)
def test_ways_of_calling(kind, args, kwargs, served, trained):
    model = trained(kind())
    fused = rf.fuse(model)
    for _ in range(2):
        result = check(fused, model, *args, **kwargs, served=bool(served))
        assert isinstance(result, Exception) == (served is None)
    check(fused, model, *{Unused: (X, Y), TwoImages: (X, Y)}.get(kind, (X,)))


class PassesKeywords(nn.Module):
    """Calls a part in a way that its parent's trace must follow."""

    def __init__(self, inner, **kwargs):
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, x):
        return self.inner(x=x, **self.kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"scale": 0.5}, {"mask": None}], ids=str)
def test_a_part_that_is_called_by_keyword(kwargs, trained):
    model = trained(PassesKeywords(Optional(), **kwargs))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert ops(fused) == ["conv2d_bn_relu"]


def test_a_part_is_called_with_and_without_an_optional_argument(trained):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Optional()

        def forward(self, x):
            return self.inner(x) + self.inner(x, mask=x)

    model = trained(Both())
    fused = rf.fuse(model)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fused(X), model(X))
    assert sum(counts(fused)) == 2


ROOTS = {
    "sequential": lambda: nn.Sequential(*unit()),
    "unit": Unit,
    "basic-block": lambda: rf.BasicBlock(8, 8),
    "bottleneck": lambda: rf.Bottleneck(8, 2),
    "without-relu": lambda: nn.Sequential(*unit()[:2]),
}


@pytest.mark.parametrize("make", ROOTS.values(), ids=ROOTS)
def test_a_root_that_is_one_unit_keeps_its_class_and_parts(make, trained):
    model = trained(make())
    fused = rf.fuse(model)
    assert type(fused) is type(model)
    assert [(name, type(m)) for name, m in fused.named_modules()] == [(name, type(m)) for name, m in model.named_modules()]
    check(fused, model, X)
