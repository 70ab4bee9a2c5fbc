"""Fixtures of the CPU kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resnet_fused.backends import get


@pytest.fixture(autouse=True)
def _library() -> None:
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _poisoned_results() -> Iterator[None]:
    """PyTorch fills the memory of new results with NaN, so that a pixel that isn't written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
