"""Residual blocks in inference: torchvision's and ours."""

from __future__ import annotations

import pytest
import torch
from support.shapes import BATCH, BLOCKS, assert_close
from torchvision.models import resnet

import resnet_fused as rf


@pytest.mark.parametrize("name, inplanes, planes, size", BLOCKS, ids=lambda value: str(value))
@pytest.mark.parametrize("variant", ["torchvision", "resnet_fused"])
def test_block(benchmark, name: str, inplanes: int, planes: int, size: int, variant: str):
    stock = getattr(resnet, name)(inplanes, planes).eval()
    ours = getattr(rf, name)(inplanes, planes).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(BATCH, inplanes, size, size).contiguous(memory_format=torch.channels_last)
    assert_close(ours(x), stock(x))
    benchmark.group = f"{name} {inplanes}-{planes} {size}px"
    benchmark(ours if variant == "resnet_fused" else stock, x)
