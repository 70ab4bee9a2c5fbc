"""Fixtures for all tests: seeds, threads, and models with batch-norm statistics as after training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused.backends import get

# A user's choices and measurements must not reach the tests, nor those of the tests the user.
os.environ.pop("RESNET_FUSED_BACKEND", None)
os.environ["RESNET_FUSED_CACHE_DIR"] = tempfile.mkdtemp(prefix="resnet_fused_tests_")


# Instruction sets that there are CPU kernels for, by their numbers in csrc/cpu/isa.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="device that tensors and models of the tests are made on: cpu (default) or cuda"
    )


# Folders of the tests that make their tensors on --device.
ON_DEVICE = ("ops", "modules", "training", "fuse", "tuning")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tensors that a file makes while it is imported are the same in each run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Whatever a test, or its file, makes without naming a device is made on --device."""
    device = config.getoption("--device")
    if device != "cpu":
        torch.set_default_device(device)
        # Tolerances are those of float32; `resnet-fused verify --device` judges TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        # Where a test compares bits, stock's own must be the same twice.
        torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    for item in items:
        for_gpus = item.get_closest_marker("gpu") is not None
        if device == "cpu":
            if for_gpus:
                item.add_marker(pytest.mark.skip(reason="it needs a GPU; run it with --device cuda on a machine with one"))
        elif for_gpus:
            continue
        elif item.path.relative_to(Path(__file__).parent).parts[0] not in ON_DEVICE:
            item.add_marker(pytest.mark.skip(reason="it doesn't depend on --device; run it without"))
        elif item.get_closest_marker("cpu") is not None or "isa" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="its subject is for CPU tensors; run it without --device"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@torch.no_grad()
def randomize_norms(model: nn.Module) -> nn.Module:
    """Gives every batch norm parameters and statistics that a mistake would show in, negative and zero gamma included."""
    for module in model.modules():
        if hasattr(module, "running_var") and module.running_var is not None:
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                module.weight.uniform_(0.3, 0.9)
                module.weight.view(-1)[0] *= -1
                module.weight.view(-1)[-1] = 0
                module.bias.normal_(std=0.2)
    return model


@pytest.fixture
def trained() -> Callable[[nn.Module], nn.Module]:
    """Makes a model look trained: its batch norms hold statistics, and it is in eval mode."""
    return lambda model: randomize_norms(model).eval()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each instruction set that the CPU kernels are made for."""
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)
    ops = torch.ops.resnet_fused_cpu
    if ops.limit_isa(ISAS[request.param]) != ISAS[request.param]:
        ops.limit_isa(max(ISAS.values()))
        pytest.skip(f"this CPU has no {request.param}; run the tests on one that has")
    yield request.param
    ops.limit_isa(max(ISAS.values()))
