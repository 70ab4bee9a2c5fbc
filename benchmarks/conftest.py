"""Every benchmark runs in inference and from the same seed; it checks its result before a time is taken."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
