"""What a fast path adds to its kernel in eager mode: guards and the choice of a kernel must cost at most 10 µs a call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused.backends.binding import bind
from resnet_fused.fusion.rows import path_of


@pytest.mark.parametrize("variant", ["1 kernel alone", "2 fused model", "3 functional"])
@torch.no_grad()
def test_dispatch(benchmark, variant: str):
    conv, norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    model = nn.Sequential(conv, norm, nn.ReLU()).eval()
    fused = rf.fuse(model)
    x = torch.randn(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    expected = fused(x)
    path = path_of(fused)
    assert path is not None
    (run,) = path.runs()
    ((problem, _),), (parameters,) = run.problems.values(), run.parameters
    kernel = bind(problem, parameters, "auto").kernel
    (weight,), (bias,) = parameters.tensors()
    benchmark.group = "dispatch of a 1-pixel convolution"
    calls = {
        "1 kernel alone": lambda: kernel(x, None),
        "2 fused model": lambda: fused(x),
        "3 functional": lambda: rf.functional.conv2d_bn_relu(x, weight, bias),
    }
    torch.testing.assert_close(calls[variant](), model(x))
    torch.testing.assert_close(expected, model(x))
    benchmark(calls[variant])
