"""Every benchmark runs in inference and from the same seed; it checks its result before a time is taken.

`--device cuda` runs those of layers, blocks and models on a GPU, in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that tensors and models are made on: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        torch.set_default_dtype(torch.float16)
        torch.backends.cudnn.benchmark = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.getoption("--device") != "cpu" and item.path.name in ("test_dispatch.py", "test_launch.py"):
            item.add_marker(pytest.mark.skip(reason="it times what a CPU does; run it without --device"))


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class _OnGpu:
    """pytest-benchmark's fixture, each of whose calls ends when the GPU has done its work."""

    def __init__(self, benchmark: Any) -> None:
        object.__setattr__(self, "_benchmark", benchmark)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._benchmark, name, value)

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        def waited(*args: Any) -> Any:
            y = call(*args)
            torch.cuda.synchronize()
            return y

        return self._benchmark(waited, *args)


@pytest.fixture
def benchmark(benchmark, request):
    return benchmark if request.config.getoption("--device") == "cpu" else _OnGpu(benchmark)
