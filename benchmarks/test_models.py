"""Whole models in inference: stock channels_last, and fused."""

from __future__ import annotations

import pytest
import torch
from support.shapes import MODELS

import resnet_fused as rf
from resnet_fused.bench.workloads import Workload


@pytest.mark.parametrize("name, batch", MODELS, ids=lambda value: str(value))
@pytest.mark.parametrize("variant", ["stock", "resnet_fused"])
def test_model(benchmark, name: str, batch: int, variant: str):
    device, dtype = torch.get_default_device(), str(torch.get_default_dtype()).removeprefix("torch.")
    model, x = Workload(name, batch, dtype, device=str(device)).make()
    x = x.contiguous(memory_format=torch.channels_last)
    fused = rf.fuse(model)
    assert rf.verify(model, fused, x[:1]).passed
    benchmark.group = f"{name} batch {batch}"
    benchmark(fused if variant == "resnet_fused" else model.to(memory_format=torch.channels_last), x)
