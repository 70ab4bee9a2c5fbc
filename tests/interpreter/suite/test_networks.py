"""Whole fused networks on the Triton kernels."""

import pytest
import timm
import torch
from support.fast_paths import rows, served
from support.plain_resnet import PlainResNet
from torch import nn
from torchvision.models import resnet18, resnet50

import resnet_fused as rf
from resnet_fused.backends.triton import launch

F32, F16 = torch.float32, torch.float16
NARROW = (16, 32, 64, 128)

# The model, its type, and the size of the image. The cases of float32 multiply by IEEE arithmetic, in small tiles, which the
# interpreter takes a minute for at full width; those of float16 by tensor cores' tiles.
NETWORKS = {
    "resnet18": (lambda: timm.create_model("resnet18", channels=NARROW), F32, (32, 32)),
    "resnet50": (lambda: timm.create_model("resnet50", channels=NARROW), F32, (32, 32)),
    "resnet18-f16": (resnet18, F16, (32, 32)),
    "resnet50-f16": (resnet50, F16, (32, 32)),
    "odd-sizes": (lambda: timm.create_model("resnet18", channels=NARROW), F16, (30, 35)),
    "plain": (lambda: PlainResNet(widths=NARROW), F16, (32, 32)),
    "plain-bottleneck": (lambda: PlainResNet(bottleneck=True, widths=NARROW), F16, (32, 32)),
    "plain-f32": (PlainResNet, F32, (32, 32)),
}


@pytest.mark.parametrize(("make", "dtype", "size"), [pytest.param(*case, id=name) for name, case in NETWORKS.items()])
def test_a_fused_resnet_keeps_its_results(make, dtype, size):
    torch.manual_seed(0)
    model = make()
    # Running statistics as after training.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    model = model.eval().to(dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 3, *size).to(dtype, memory_format=torch.channels_last)
    fused = rf.fuse(model)
    verification = rf.verify(model, fused, x)
    assert verification.passed, str(verification)
    assert {backend for _, backend in served(fused)} == {"triton"}
    assert all(row.op for row in rows(fused)), "a convolution was left to stock"


def test_a_fused_resnet_compiles_into_one_graph(monkeypatch):
    """Through Inductor: the ops stay as they are, on the kernels of the backend."""
    launched = []
    interpret = launch.interpret
    monkeypatch.setattr(launch, "interpret", lambda *args: launched.append(args) or interpret(*args))
    torch.manual_seed(0)
    model = PlainResNet(widths=(16, 32)).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    fused = rf.fuse(model)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True)
        # The second size is another graph.
        for images in (x, x[..., 4:]):
            expected = fused(images)
            kernels = len(launched)
            launched.clear()
            torch.testing.assert_close(compiled(images), expected)
            assert len(launched) == kernels > 0
            launched.clear()
