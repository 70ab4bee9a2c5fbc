"""What the tests of fused models by kinds of use share: small parts, and the comparison with stock of all that a call shows."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import resnet_fused as rf
from support.tolerances import assert_as_good_as_stock


def unit(
    inputs: int = 8, outputs: int = 8, kernel: int = 3, stride: int = 1, padding: int = 1, **kwargs: Any
) -> list[nn.Module]:
    """Convolution, batch norm and ReLU."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU()]


class Unit(nn.Module):
    """The same as attributes of a module, whose forward other classes override."""

    def __init__(self, inputs: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = unit(inputs, outputs)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def counts(fused: nn.Module) -> tuple[int, int]:
    """Calls in which a fast path served, and in which none did."""
    found = rf.report(fused, file=io.StringIO())
    return found.calls_fused, found.calls_stock


def ops(fused: nn.Module) -> list[str]:
    return [row.op for row in rf.report(fused, file=io.StringIO()).rows]


def assert_same(got: Any, want: Any, truth: Any = None) -> None:
    """Asserts that results have one structure, and tensors the same kind, strides and values within the tolerances."""
    leaves, structure = _pytree.tree_flatten(got)
    stock, wanted = _pytree.tree_flatten(want)
    assert structure == wanted
    exact = [None] * len(stock) if truth is None else _pytree.tree_leaves(truth)
    for a, b, t in zip(leaves, stock, exact, strict=True):
        assert type(a) is type(b)
        if not isinstance(b, Tensor):
            if hasattr(b, "__dict__"):
                assert_same({**vars(a)}, {**vars(b)}, None if t is None else {**vars(t)})
            else:
                assert a == b
            continue
        assert a.stride() == b.stride(), f"strides {a.stride()}, stock's {b.stride()}"
        assert (a.device, a.requires_grad, a.is_contiguous()) == (b.device, b.requires_grad, b.is_contiguous())
        if t is None or not b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert_as_good_as_stock(a, b, t)


def _wide(value: Any) -> Any:
    return _pytree.tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, copy.deepcopy(value)
    )


@torch.no_grad()
def outcome(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call, or its exception."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        return error


def check(fused: nn.Module, model: nn.Module, *args: Any, served: bool = True, **kwargs: Any) -> Any:
    """Calls a fused model and its original, compares all that the calls show, and asserts that a fast path served, or didn't.

    Gives the fused model's result.
    """
    before = counts(fused)
    want = outcome(model, args, kwargs)
    got = outcome(fused, args, kwargs)
    if isinstance(want, Exception):
        assert type(got) is type(want)
        assert str(got) == str(want)
        return got
    assert not isinstance(got, Exception), got
    after = counts(fused)
    assert (after[0] - before[0], after[1] - before[1]) == ((1, 0) if served else (0, 1)), rf.report(
        fused, io.StringIO()
    ).reason
    with torch.no_grad():
        assert_same(got, want, copy.deepcopy(model).double()(*_wide(args), **_wide(kwargs)))
    return got


def check_comes_back(fused: nn.Module, model: nn.Module, x: Tensor, calls: int = 8) -> None:
    """Asserts that results are right, and that a fast path serves again within some calls, since it may wait before a trace."""
    for _ in range(calls):
        before = counts(fused)[0]
        with torch.no_grad():
            assert_same(fused(x), model(x))
        if counts(fused)[0] > before:
            return
    raise AssertionError(f"no fast path serves: {rf.report(fused, io.StringIO()).reason}")
