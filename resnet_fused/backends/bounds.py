"""Upper bounds of values within one call of a program, by which a kernel may know that no NaN can arise.

A bound belongs to a tensor that a kernel made in the same call, and is forgotten when anything but a kernel runs. Nothing is
known of tensors that come from outside, or in a later call: they may have been written to in ways that leave no trace.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Known = dict[int, tuple["weakref.ref[Tensor]", float]]


class _Local(threading.local):
    known: _Known | None = None


_local = _Local()


@contextmanager
def within_a_call() -> Iterator[_Known]:
    """Within the `with` block bounds are kept, for this thread. Gives what keeps them, to clear it."""
    before, _local.known = _local.known, {}
    try:
        yield _local.known
    finally:
        _local.known = before


def kept() -> bool:
    """Whether bounds are kept here and now."""
    return _local.known is not None


def of(x: Tensor) -> float:
    """A bound of |x| that was told in this call; infinity where there is none."""
    found = (_local.known or {}).get(id(x))
    return found[1] if found is not None and found[0]() is x else torch.inf


def look(x: Tensor) -> float:
    """max|x| of a channels_last tensor, by its values, and told from then on; NaN if there is one."""
    # Flat, because the reduction over a permuted tensor was measured to take 20 times as long.
    low, high = torch.aminmax(x.detach().movedim(1, -1).reshape(-1))
    value = torch.maximum(low.abs(), high.abs()).item()
    tell(x, value)
    return value


def same(y: Tensor, x: Tensor) -> Tensor:
    """y, a view of all of x, of which is known what is known of x."""
    if _local.known is not None:
        tell(y, of(x))
    return y


def tell(x: Tensor, bound: float) -> None:
    """Notes a bound of |x|."""
    if _local.known is not None:
        _local.known[id(x)] = weakref.ref(x), bound
