"""Fixtures of the benchmarks: results are checked before a time is taken, and shapes stand in one file."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
