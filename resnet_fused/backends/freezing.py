"""Whether kernels run as they stand in the graph of a frozen model: operators of tensors, registered from C++, without a state.

Only backends with `freezes` serve there, and a kernel of theirs that is registered from Python calls such operators instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_freezing: ContextVar[bool] = ContextVar("resnet_fused_freezing", default=False)


@contextlib.contextmanager
def freeze_kernels() -> Iterator[None]:
    """Within the `with` block, kernels are found and run in their frozen form."""
    token = _freezing.set(True)
    try:
        yield
    finally:
        _freezing.reset(token)


def freezing() -> bool:
    """Whether this is within `freeze_kernels`."""
    return _freezing.get()
