"""Every test of this folder runs on the triton backend, and finds uninitialised memory filled with NaN."""

import pytest
import torch

import resnet_fused as rf


@pytest.fixture(autouse=True)
def triton_backend():
    with rf.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    # With deterministic algorithms torch.empty and its relatives fill what they return with NaN.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def float32_precision():
    """Sets torch.backends.cudnn.conv.fp32_precision for the test."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    yield lambda value: setattr(settings, "fp32_precision", value)
    settings.fp32_precision = before
