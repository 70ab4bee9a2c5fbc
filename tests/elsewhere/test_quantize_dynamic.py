"""torch.ao.quantization.quantize_dynamic finds the linear layers of a fused model; its convolutions stay fused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from support.kinds import check, counts, ops
from torch import nn

import resnet_fused as rf

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")]
# torch.ao.quantization's own observers ask for linear layers by type, or by name.
SPECIFICATIONS = {"types": {nn.Linear}, "names": {"fc": torch.ao.quantization.default_dynamic_qconfig}, "default": None}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("what", SPECIFICATIONS)
def test_the_classifier_is_found(what, inplace, format, trained):
    model = trained(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5))
    x = torch.randn(2, 3, 40, 48).to(memory_format=format)
    fused = rf.fuse(model.to(memory_format=format))
    check(fused, model, x)
    want = torch.ao.quantization.quantize_dynamic(model, SPECIFICATIONS[what])
    got = torch.ao.quantization.quantize_dynamic(fused, SPECIFICATIONS[what], inplace=inplace)
    assert (got is fused) == inplace
    assert type(got.fc) is type(want.fc)
    assert "quantized" in type(got.fc).__module__
    before = counts(got)[0] if inplace else 0
    with torch.no_grad():
        for _ in range(3):
            y, stock = got(x), want(x)
            # Steps of eight bits: features that differ by a rounding may fall on both sides of one.
            torch.testing.assert_close(y, stock, rtol=0.05, atol=0.05)
            assert y.stride() == stock.stride()
    assert counts(got)[0] - before >= 2
    assert all(ops(got))
    if not inplace:
        check(fused, model, x)
