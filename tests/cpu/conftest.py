"""Fixtures of the CPU kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resnet_fused.backends import get

ISAS = {"avx2": 1, "avx512": 2}


@pytest.fixture(autouse=True)
def _library() -> None:
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each instruction set that this CPU has kernels for."""
    ops = torch.ops.resnet_fused_cpu
    if ops.limit_isa(ISAS[request.param]) != ISAS[request.param]:
        ops.limit_isa(max(ISAS.values()))
        pytest.skip(f"this CPU has no {request.param}; run the tests on one that has")
    yield request.param
    ops.limit_isa(max(ISAS.values()))


@pytest.fixture(autouse=True)
def _poisoned_results() -> Iterator[None]:
    """PyTorch fills the memory of new results with NaN, so that a pixel that isn't written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
