"""Skips where there is no CUDA toolkit or the library was not built."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx_executor import ToolkitNotFound, find_toolkit

from resnet_fused.backends import library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = library.load("resnet_fused_cuda")
    try:
        find_toolkit()
    except ToolkitNotFound as error:
        reason = str(error)
    if reason is not None:
        folder = Path(__file__).parent
        for item in items:
            if folder in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
