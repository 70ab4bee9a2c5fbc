"""What the executor's tests share: CUDA kernels compiled once for each architecture and flags."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import ptx_executor as px
import pytest

HERE = Path(__file__).parent


@functools.cache
def _compiled(name: str, arch: str, flags: tuple[str, ...]) -> px.Module:
    return px.Module(px.compile_ptx(HERE / "kernels" / name, arch, flags))


@pytest.fixture
def cuda() -> Callable[..., px.Module]:
    """A compiled file of kernels/ as a module; skips where there is no nvcc."""
    try:
        px.find_toolkit()
    except px.ToolkitNotFound as missing:
        pytest.skip(str(missing))
    return lambda name, arch="sm_80", *flags: _compiled(name, arch, flags)


@pytest.fixture
def memory() -> px.Memory:
    return px.Memory()
