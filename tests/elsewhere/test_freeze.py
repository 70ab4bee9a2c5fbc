"""rf.freeze: the same answers, graphs of operators that are registered from C++ alone, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from support.kinds import assert_same
from support.processes import run_python
from torch import nn
from torchvision.models.resnet import BasicBlock

import resnet_fused as rf
from resnet_fused.backends import get

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(get("cpu").unavailable() is not None, reason=str(get("cpu").unavailable()))]

SHAPE = (2, 3, 40, 48)


def network() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


class Gated(nn.Module):
    """A gate, a batch norm by itself, a mean, a concatenation, a function that our kernels lack, and strided values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.GELU())
        self.squeeze, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(32)

    def forward(self, x):
        x = self.stem(x)
        y = self.deep(x)
        y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        return {"features": self.norm(torch.cat((x, y), 1)).relu(), "half": y[:, ::2]}


class Signal(nn.Module):
    """Convolutions of one dimension, which kernels for images compute in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(3, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1))

    def forward(self, x):
        return self.layers(x.flatten(2))


def hooked() -> nn.Module:
    """With a layer that runs as stock as a whole, for its hook."""
    model = network()
    model.layer2.register_forward_hook(lambda module, args, output: output * 2)
    return model


MODELS = {"resnet": network, "gated": Gated, "signal": Signal, "hooked": hooked}


def operators(exported: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_the_same_answers_in_python_and_exported(make, format, trained):
    model = trained(make()).to(memory_format=format)
    x = torch.randn(SHAPE).to(memory_format=format)
    frozen = rf.freeze(rf.fuse(model), x)
    exported = torch.export.export(frozen, (x,))
    found = operators(exported)
    assert any(name.startswith("resnet_fused_cpu.frozen_conv") for name in found)
    assert not any(name.startswith("resnet_fused.") for name in found), "an operator that is registered in Python"
    wide, served = copy.deepcopy(model).double(), exported.module()
    ordinary = x
    for value in (0.5, float("nan"), float("-inf"), 1e10):
        x = ordinary.clone()
        x[1, 2, 7, 9] = value
        want, truth = model(x), wide(x.double())
        assert_same(frozen(x), want, truth)
        assert_same(served(x), want, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_the_same_answers_on_a_gpu(make, dtype, trained):
    model = trained(make()).to("cuda", dtype)
    ordinary = torch.randn(SHAPE, device="cuda").to(dtype)
    frozen = rf.freeze(rf.fuse(model), ordinary)
    exported = torch.export.export(frozen, (ordinary,))
    found = operators(exported)
    assert "resnet_fused_cuda.frozen_input.default" in found
    assert not any(name.startswith("resnet_fused.") for name in found), "an operator that is registered in Python"
    wide, served = copy.deepcopy(model).double(), exported.module()
    for value in (0.5, float("nan"), float("-inf")):
        x = ordinary.clone()
        x[1, 2, 7, 9] = value
        want, truth = model(x), wide(x.double())
        assert_same(frozen(x), want, truth)
        assert_same(served(x), want, truth)
    with pytest.raises(ValueError, match="not on a GPU"):
        frozen(ordinary.cpu())


def test_examples_on_a_device_without_frozen_kernels_are_refused(trained):
    with pytest.raises(rf.BackendError, match="no backend has a frozen form for meta; freeze the model on the CPU or"):
        rf.freeze(rf.fuse(trained(network())), torch.empty(SHAPE, device="meta"))


@torch.no_grad()
def test_other_strides_than_the_example_s(trained):
    model, x = trained(network()), torch.randn(SHAPE)
    frozen = rf.freeze(rf.fuse(model), x)
    torch.testing.assert_close(frozen(x.to(memory_format=torch.channels_last)), frozen(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # PyTorch's, of weights in channels_last
@torch.no_grad()
def test_an_exported_program_is_served_by_another_process(trained, tmp_path: Path):
    model, x = trained(network()), torch.randn(SHAPE)
    frozen = rf.freeze(rf.fuse(model), x)
    torch.export.save(torch.export.export(frozen, (x,)), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    run_python(
        "import sys, torch\n"
        "import resnet_fused as rf\n"
        "rf.available_backends()\n"
        "exported, x = torch.export.load(f'{sys.argv[1]}/model.pt2'), torch.load(f'{sys.argv[1]}/x.pt')\n"
        "exported.run_decompositions()\n"  # by the fake results
        "torch.save(exported.module()(x), f'{sys.argv[1]}/y.pt')\n",
        tmp_path,
    )
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), frozen(x), rtol=0, atol=0)


@torch.no_grad()
def test_direct_precision_keeps_no_weights_for_winograd(trained):
    model, x = trained(network()), torch.randn(SHAPE)
    kept = {
        precision: sum(
            t.numel() for t in torch.export.export(rf.freeze(rf.fuse(model, precision=precision), x), (x,)).constants.values()
        )
        for precision in ("fast", "direct")
    }
    weights = sum(p.numel() for p in model.parameters())
    assert kept["direct"] < 1.1 * weights < kept["fast"]


@pytest.mark.parametrize("make", [network, hooked], ids=["resnet", "hooked"])
@torch.no_grad()
def test_later_changes_of_the_model_do_not_reach_it(make, trained):
    model, x = trained(make()), torch.randn(SHAPE)
    fused = rf.fuse(model)
    frozen = rf.freeze(fused, x)
    want = frozen(x)
    for parameter in fused.parameters():
        parameter.zero_()
    torch.testing.assert_close(frozen(x), want, rtol=0, atol=0)


class Reading(nn.Module):
    """A forward that can't be traced, with convolutions in a child that can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x):
        print(end="")
        return self.net(x)


def test_what_it_refuses(trained):
    model, x = trained(network()), torch.randn(SHAPE)
    fused = rf.fuse(model)
    with pytest.raises(TypeError, match="model is Tensor"):
        rf.freeze(x, x)
    with pytest.raises(ValueError, match=r"model is not fused; freeze what rf.fuse\(model\) returns"):
        rf.freeze(model, x)
    with pytest.raises(ValueError, match="example_inputs is empty; give the model's arguments"):
        rf.freeze(rf.fuse(trained(network())), ())
    with pytest.raises(TypeError, match="example_inputs has a list"):
        rf.freeze(fused, [x])
    with pytest.raises(ValueError, match=r"example_inputs has a tensor of shape \(0, 3, 40, 48\)"):
        rf.freeze(fused, x[:0])
    with pytest.raises(ValueError, match="example_inputs has 2 tensors; the model's forward takes 1"):
        rf.freeze(fused, (x, x))
    with pytest.raises(rf.BackendError, match="backend 'onednn' has no frozen form"):
        rf.freeze(rf.fuse(model, backend="onednn"), x)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is on"):
        rf.freeze(fused, x)
    with pytest.raises(ValueError, match="its forward isn't one program: .*print"):
        rf.freeze(rf.fuse(trained(Reading())), x)
    with pytest.raises(ValueError, match="can't be frozen for such inputs"):
        rf.freeze(fused, x.double())
    with pytest.raises(ValueError, match="2 inputs were given; the model was frozen for 1"):
        rf.freeze(fused, x)(x, x)
    with pytest.raises(ValueError, match="call model.eval"):
        rf.freeze(fused.train(), x)


@torch.no_grad()
def test_other_shapes_are_refused_in_python_and_by_export(trained):
    x = torch.randn(SHAPE)
    frozen = rf.freeze(rf.fuse(trained(network())), x)
    for call in (frozen, torch.export.export(frozen, (x,)).module(), lambda x: torch.export.export(frozen, (x,))):
        with pytest.raises((ValueError, AssertionError, RuntimeError), match="frozen for|Guard failed|shape"):
            call(x[:1])
