"""Whole fused networks on the Triton kernels."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fused as rf


def network(block: type[nn.Module]) -> nn.Module:
    """The stem and the first two stages of a ResNet, one block each, with running statistics as after training."""
    torch.manual_seed(0)
    model = ResNet(block, [1, 1, 1, 1])
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return model.eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck], ids=["basic", "bottleneck"])
def test_a_fused_resnet_keeps_its_results(block):
    model = network(block)
    x = torch.randn(1, 3, 30, 34).to(memory_format=torch.channels_last)
    fused = rf.fuse(model)
    verification = rf.verify(model, fused, x)
    assert verification.passed, str(verification)
    used = {name for module in fused.modules() if hasattr(module, "backends_used") for name in module.backends_used()}
    assert used == {"triton"}
