"""What a fused module adds to its kernel in eager mode: the choice of a kernel must cost at most 10 µs a call."""

from __future__ import annotations

import pytest
import torch

import resnet_fused as rf
from resnet_fused.modules import FusedConv2d


@pytest.mark.parametrize("variant", ["1 kernel alone", "2 fused module", "3 functional"])
def test_dispatch(benchmark, variant: str):
    conv, norm = torch.nn.Conv2d(8, 8, 1).eval(), torch.nn.BatchNorm2d(8).eval()
    module = FusedConv2d.of(conv, norm, relu=True)
    x = torch.randn(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    module(x)
    assert module._runner is not None
    assert module._runner._bound is not None
    (kernel,) = module._runner._bound.kernels.values()
    benchmark.group = "dispatch of a 1-pixel convolution"
    calls = {
        "1 kernel alone": lambda: kernel(x, None),
        "2 fused module": lambda: module(x),
        "3 functional": lambda: rf.functional.conv2d_bn_relu(x, module.weight, module.shift),
    }
    torch.testing.assert_close(calls[variant](), norm(conv(x)).relu())
    benchmark(calls[variant])
