"""Forwards that ask for the types of values, and that write to parts of what they made."""

from __future__ import annotations

import pytest
import torch
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import Tensor, nn

import resnet_fused as rf

X = torch.randn(2, 8, 9, 7)


class DenseLayer(nn.Module):
    """Takes a tensor or a list of them, as DenseNet's layers."""

    def __init__(self, inside) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(inside), nn.ReLU(inplace=True), nn.Conv2d(inside, 4, 3, padding=1)
        self.after = nn.BatchNorm2d(4)

    def forward(self, x):
        features = [x] if isinstance(x, Tensor) else x
        return self.after(self.conv(self.relu(self.norm(torch.cat(features, 1)))))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": DenseLayer(8 + 4 * i) for i in range(3)})

    def forward(self, x):
        features = [x]
        for _, layer in self.layers.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class Listed(nn.Module):
    """Gives a list or a tensor, and takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Unit(), Unit()

    def forward(self, x):
        y = self.first(x)
        if not isinstance(y, (list, tuple)):
            y = [y, x]
        return self.second(y[0]) + y[1] if torch.is_tensor(y[1]) else y[0]


class Remembers(nn.Module):
    """Isn't traced. Gives a tuple."""

    def forward(self, x):
        self.last = x
        return x, x * 2


class OfUntraced(nn.Module):
    """Asks for the type of what a module gives that isn't traced."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.remembers, self.last = Unit(), Remembers(), Unit()

    def forward(self, x):
        y = self.remembers(self.unit(x))
        if isinstance(y, (list, tuple)):
            y = y[1]
        return self.last(y)


class OfNumber(nn.Module):
    """Asks for the type of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x):
        size = x.shape[-1]
        return self.unit(x) * (2.0 if isinstance(size, int) else 3.0)


class OfParameter(nn.Module):
    """A parameter is another kind of tensor, which may be given as well."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x):
        return self.unit(x) * (2.0 if isinstance(x, nn.Parameter) else 3.0)


class OfFloats(OfParameter):
    def forward(self, x):
        return self.unit(x) * (2.0 if isinstance(x, torch.FloatTensor) else 3.0)


class OfShape(OfParameter):
    def forward(self, x):
        y = self.unit(x)
        return y * 2 if isinstance(y.shape, Tensor) else y * 3


class OfPool(nn.Module):
    """A pool gives a tensor, or a pair."""

    def __init__(self, pair) -> None:
        super().__init__()
        self.unit, self.pool = Unit(), nn.MaxPool2d(2, return_indices=pair)

    def forward(self, x):
        y = self.pool(self.unit(x))
        return y if isinstance(y, Tensor) else y[0] * 2


KINDS = {
    "dense": (lambda: nn.Sequential(*unit(), DenseBlock(), nn.Conv2d(20, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), 5),
    "listed": (Listed, 2),
    "of-untraced": (OfUntraced, 2),
    "of-number": (OfNumber, 1),
    "of-parameter": (OfParameter, 1),
    "of-floats": (OfFloats, 1),
    "of-shape": (OfShape, 1),
    "of-pool": (lambda: OfPool(False), 1),
    "of-pair": (lambda: OfPool(True), 1),
}


@pytest.mark.parametrize(("make", "convolutions"), KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_types(make, convolutions, trained):
    model = trained(make())
    fused = rf.fuse(model)
    for x in (X, nn.Parameter(X), X.double()):
        for _ in range(2):
            assert_same(fused.to(x.dtype)(x), model.to(x.dtype)(x))
    model.float(), fused.float()
    assert_same(fused(X), model(X))
    assert sum(map(bool, ops(fused))) == convolutions


def test_a_dense_block_is_in_one_program(trained):
    model = trained(nn.Sequential(*unit(), DenseBlock()))
    fused = rf.fuse(model)
    check(fused, model, X)
    assert ops(fused) == ["conv2d_bn_relu", *["conv2d_bn"] * 3]
    assert counts(fused) == (1, 0)


class Subclass(Tensor):
    pass


@torch.no_grad()
def test_subclasses_of_tensor_run_as_stock(trained):
    model = trained(Listed())
    fused = rf.fuse(model)
    check(fused, model, X)
    x = X.as_subclass(Subclass)
    assert type(fused(x)) is type(model(x)) is Subclass


# ---- writes to parts ---------------------------------------------------------------------------------------------------


class Ghost(nn.Module):
    """Adds to a part of what it concatenated, as GhostNet's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap, self.shortcut = Unit(), Unit(), nn.Conv2d(8, 12, 1)

    def forward(self, x):
        y = self.primary(x)
        y = torch.cat([y, self.cheap(y)], 1)[:, :12]
        y += self.shortcut(x)
        return y


class OfInput(Ghost):
    """Adds to a part of its input."""

    def forward(self, x):
        y = x[:, :4]
        y += 1
        return self.primary(x) + self.cheap(x)


class OfReshaped(Ghost):
    def forward(self, x):
        y = self.primary(x) * 2
        y.view(-1).add_(1)
        return self.cheap(y) + y


class OfDropped(Ghost):
    """A function that gives its input itself in eval mode."""

    def forward(self, x):
        y = torch.nn.functional.dropout(x, 0.5, self.training)
        y += 1
        return self.primary(x) + y


class OfSecond(Ghost):
    def forward(self, x):
        y = self.primary(x)
        torch.add(y, 1, out=x)
        return self.cheap(x)


WRITERS = {"ghost": Ghost, "input": OfInput, "reshaped": OfReshaped, "dropped": OfDropped, "out": OfSecond}


@pytest.mark.parametrize("kind", WRITERS.values(), ids=WRITERS)
@torch.no_grad()
def test_writes_to_parts(kind, trained):
    model = trained(nn.Sequential(*unit(), kind()))
    fused = rf.fuse(model)
    whole = trained(kind())
    alone = rf.fuse(whole)
    for _ in range(2):
        check(fused, model, X)
        for a, b in ((fused, model), (alone, whole)):
            x, y = X.clone(), X.clone()
            assert_same(a(x), b(y))
            assert_same(x, y)  # what is written to the input
    if kind is Ghost:
        assert counts(alone)[1] == 0
        assert all(ops(alone))


class Indexes(nn.Module):
    """Indexes a parameter by what depends on the input: compiled code looks whether that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.table = Unit(), nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        places = (x.mean((1, 2, 3)).abs() * 8).long().clamp(max=15)
        return self.unit(x) * self.table[places][:, :, None, None] * self.table[places, 0][:, None, None, None]


class Table(nn.Module):
    """Is given a size. Alone, it is traced with a stand-in for it, which compiled code must not read as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, shape):
        rows = (~torch.zeros(shape).to(torch.bool)).cumsum(1, dtype=torch.float32)[:, :, :, None]
        steps = torch.arange(8, dtype=torch.float32)
        rows = rows / 100 ** (2 * torch.div(steps, 2, rounding_mode="floor") / 8)
        table = torch.stack([rows[..., 0::2].sin(), rows[..., 1::2].cos()], dim=4).flatten(3).permute(0, 3, 1, 2)
        return self.mix(table)


class Positions(nn.Module):
    """Adds a table of sines, as EdgeNeXt's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.table = Unit(), Table()

    def forward(self, x):
        n, _, h, w = x.shape
        return self.unit(x) + self.table((n, h, w))


class OfMapped(nn.Module):
    """Calls isinstance where nobody sees it called."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x):
        return self.unit(x) * (2 if all(map(isinstance, [x], [Tensor])) else 3)


class OfMatched(OfMapped):
    def forward(self, x):
        match x:
            case Tensor():
                return self.unit(x) * 2
        return x


@pytest.mark.parametrize("kind", [Indexes, Positions, OfMapped, OfMatched])
@torch.no_grad()
def test_compiled_code_never_takes_a_stand_in_for_a_tensor(kind, trained):
    model = trained(nn.Sequential(*unit(), kind()))
    fused = rf.fuse(model)
    for size in ((2, 8, 9, 7), (1, 8, 6, 6)):
        for _ in range(2):
            x = torch.randn(size)
            assert_same(fused(x), model(x))
    assert ops(fused)[0]
