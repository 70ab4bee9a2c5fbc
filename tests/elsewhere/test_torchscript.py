"""TorchScript of fused models: traces hold the fused operators; scripts hold stock's ops, which a message says."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from support.kinds import assert_same, check, ops
from support.processes import run_python
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion import scripting

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=FORMATS, ids=["contiguous", "channels-last"])
def format(request) -> torch.memory_format:
    return request.param


@pytest.fixture
def model(trained, format) -> nn.Module:
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return trained(net).to(memory_format=format)


@pytest.fixture
def batches(format) -> list[torch.Tensor]:
    return [torch.randn(n, 3, h, w).to(memory_format=format) for n, h, w in ((2, 40, 48), (3, 64, 33))]


class Around(nn.Module):
    """A larger model with the network in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * 2


# ---- traces -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_trace_has_the_fused_operators_and_follows_the_parameters(model, batches):
    fused = rf.fuse(model)
    traced = torch.jit.trace(fused, batches[0])
    assert "resnet_fused::program" in str(traced.graph)
    assert "aten::batch_norm" not in str(traced.inlined_graph)
    for x in batches:
        assert_same(traced(x), model(x))
    for net in (fused, model):
        net.layer2[0].conv1.weight.mul_(-1)
    assert_same(traced(batches[0]), model(batches[0]))
    check(fused, model, batches[0])


@torch.no_grad()
@pytest.mark.parametrize("make", [torch.jit.freeze, torch.jit.optimize_for_inference], ids=["freeze", "optimize_for_inference"])
def test_a_trace_is_frozen(make, model, batches):
    made = make(torch.jit.trace(rf.fuse(model), batches[0]))
    for x in batches * 2:
        assert_same(made(x), model(x))


def test_traces_are_served_by_another_process(trained, tmp_path):
    results = []
    for index, format in enumerate(FORMATS):
        net = trained(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])).to(memory_format=format)
        x = torch.randn(2, 3, 40, 48).to(memory_format=format)
        with torch.no_grad():
            torch.jit.trace(rf.fuse(net), x).save(str(tmp_path / f"model{index}.pt"))
            results.append({"x": x, "y": net(x)})
    torch.save(results, tmp_path / "results.pt")
    run_python(
        "import sys, torch\n"
        "import resnet_fused\n"
        "with torch.no_grad():\n"
        "    for index, known in enumerate(torch.load(f'{sys.argv[1]}/results.pt')):\n"
        "        y = torch.jit.load(f'{sys.argv[1]}/model{index}.pt')(known['x'])\n"
        "        torch.testing.assert_close(y, known['y'], rtol=1e-4, atol=1e-5)\n"
        "        assert y.stride() == known['y'].stride()\n",
        tmp_path,
    )


# ---- scripts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(caplog):
    """What the library says; it has said nothing of scripts so far."""
    scripting._say.cache_clear()
    caplog.set_level(logging.WARNING, "resnet_fused")
    return caplog


@torch.no_grad()
def test_a_script_computes_as_stock_and_says_so_once(model, batches, tmp_path, messages):
    fused = rf.fuse(model)
    check(fused, model, batches[0])
    for _ in range(2):
        scripted = torch.jit.script(fused)
    assert sum("torch.jit.trace" in record.getMessage() for record in messages.records) == 1
    scripted.save(str(tmp_path / "scripted.pt"))
    for made in (scripted, torch.jit.load(str(tmp_path / "scripted.pt")), torch.jit.freeze(scripted)):
        for x in batches:
            torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-6)
            assert made(x).stride() == model(x).stride()
    # The fused model is as it was, and has its parameters in common with the script.
    for x in batches:
        check(fused, model, x)
    assert all(ops(fused))
    for net in (fused, model):
        net.fc.weight.mul_(3)
    torch.testing.assert_close(scripted(batches[0]), model(batches[0]), rtol=1e-5, atol=1e-6)
    assert scripted.training is False


@torch.no_grad()
def test_scripts_of_parts_and_copies(model, batches):
    fused, x = rf.fuse(model), torch.randn(1, 64, 10, 12)
    torch.testing.assert_close(torch.jit.script(fused.layer1)(x), model.layer1(x))
    # A shallow copy with another head is another model.
    other = copy.copy(fused)
    other._modules = {**fused._modules, "fc": nn.Linear(512, 2)}
    assert torch.jit.script(other)(batches[0]).shape == (2, 2)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(torch.jit.script(again)(batches[0]), model(batches[0]))
        check(again, model, batches[0])
    with_own = rf.fuse(model)
    with_own.layer1[0].forward = with_own.layer1[0].forward  # found in the instance, as of a class's own
    torch.testing.assert_close(torch.jit.script(with_own)(batches[0]), model(batches[0]))


@torch.no_grad()
def test_a_script_of_a_model_around_a_fused_one(model, batches):
    fused = rf.fuse(model)
    around, stock = Around(fused).eval(), Around(model).eval()
    torch.testing.assert_close(torch.jit.script(around)(batches[0]), stock(batches[0]))
    check(fused, model, batches[0])
    assert_same(around(batches[0]), stock(batches[0]))
    check(rf.fuse(around), stock, batches[0])


def test_scripts_of_training(model, batches):
    """The forward alone: that a model trains is asked when it is called."""
    fused = rf.fuse(model)
    scripted, stock = torch.jit.script(fused.train()), model.train()
    torch.testing.assert_close(scripted(batches[0]), stock(batches[0]), rtol=1e-4, atol=1e-5)


def test_unfused_models_have_no_hook(model):
    fused = rf.fuse(model)
    rf.unfuse(fused)
    assert not any(hasattr(module, "__prepare_scriptable__") for module in fused.modules())
