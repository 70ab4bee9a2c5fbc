"""Fused models under torch.func, forward-mode differentiation and ONNX export, for which only stock ops have rules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import resnet_fused as rf


class Net(nn.Module):
    """A stem, a basic block, a bottleneck, a sum, and a convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(rf.BasicBlock(8, 8), rf.Bottleneck(8, 4, stride=2))
        self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = self.relu(self.bn(self.conv(x)) + x)
        return self.fc(self.pool(x).flatten(1))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 20, 20)


@pytest.fixture
def models(trained, x) -> tuple[nn.Module, nn.Module]:
    """The original, and the fused one with kernels for x."""
    model = trained(Net())
    fused = rf.fuse(model)
    with torch.no_grad():
        fused(x)
    return model, fused


def _same(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_vmap_and_per_sample_gradients(models, x):
    want, got = (torch.vmap(lambda image, m=m: m(image[None])[0])(x) for m in models)
    _same(got, want)
    want, got = (torch.vmap(torch.func.grad(lambda image, m=m: m(image[None]).sum()))(x) for m in models)
    _same(got, want)


def test_an_ensemble(models, x):
    _, fused = models
    others = [fused, copy.deepcopy(fused)]
    with torch.no_grad():
        for parameter in others[1].parameters():
            parameter.mul_(0.9)
    states = {name: torch.stack([m.state_dict()[name] for m in others]) for name in fused.state_dict()}
    got = torch.vmap(lambda state: torch.func.functional_call(fused, state, (x,)))(states)
    _same(got, torch.stack([m(x) for m in others]))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(models, x, grad):
    tangents = []
    for model in models:
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(forward_ad.unpack_dual(model(dual)).tangent)
    assert tangents[1] is not None
    assert torch.equal(tangents[1], tangents[0])
    _same(torch.func.jvp(models[1], (x,), (torch.ones_like(x),))[1], tangents[0])


def test_functions_under_forward_mode():
    x, residual = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    _, tangent = torch.func.jvp(rf.functional.add_relu, (x, residual), (x, residual))
    _same(tangent, (x + residual).relu())


@pytest.mark.filterwarnings("ignore")
def test_onnx(models, x):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; pip install 'resnet_fused[peers]'")
    program = torch.onnx.export(models[1], (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}


@pytest.mark.parametrize(
    "value", [None, 3, np.zeros((1, 3, 20, 20), np.float32), [torch.zeros(3, 20, 20)]], ids=["None", "int", "numpy", "list"]
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_what_is_no_tensor_is_refused_as_by_stock(models, value, grad):
    errors = []
    for model in models:
        with torch.set_grad_enabled(grad), pytest.raises(TypeError) as error:
            model(value)
        errors.append(str(error.value))
    assert errors[1] == errors[0]
