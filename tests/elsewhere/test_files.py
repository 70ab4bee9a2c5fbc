"""Fused models in files, without pickled code: state dicts, safetensors, and programs of torch.export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from support.kinds import assert_same, check, ops
from support.processes import run_python
from support.tolerances import assert_as_good_as_stock
from torch import nn

import resnet_fused as rf


def network() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).eval()


# ---- state dicts --------------------------------------------------------------------------------------------------------


def _state_dict(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def _load_state_dict(model: nn.Module, path: Path) -> None:
    model.load_state_dict(torch.load(path, weights_only=True))


def _safetensors(model: nn.Module, path: Path) -> None:
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed; pip install safetensors").save_model(
        model, path
    )


def _load_safetensors(model: nn.Module, path: Path) -> None:
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed; pip install safetensors").load_model(
        model, path
    )


@pytest.mark.parametrize("called", [False, True], ids=["never-called", "called"])
@pytest.mark.parametrize(
    ("save", "load"), [(_state_dict, _load_state_dict), (_safetensors, _load_safetensors)], ids=["state-dict", "safetensors"]
)
def test_weights_of_a_fused_model_fit_a_plain_one_and_the_other_way(save, load, called, trained, tmp_path):
    model, x = trained(network()), torch.randn(2, 3, 40, 40)
    fused = rf.fuse(model)
    if called:
        check(fused, model, x)
    save(fused, tmp_path / "fused")
    save(model, tmp_path / "plain")
    plain = network()
    load(plain, tmp_path / "fused")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    check(rf.fuse(plain), model, x)
    into = rf.fuse(network())
    with torch.no_grad():
        into(x)  # whose kernels have packed other weights by now
    load(into, tmp_path / "plain")
    check(into, model, x)
    assert all(ops(into))


def test_weights_that_do_not_fit_are_refused_as_by_stock(tmp_path):
    fused = rf.fuse(network())
    other = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc.weight.*\[7, 512\].*\[5, 512\]"):
        fused.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*layer4.0.conv2.weight"):
        fused.load_state_dict({key: value for key, value in network().state_dict().items() if key != "layer4.0.conv2.weight"})


def test_released_weights_are_not_written():
    x = torch.randn(1, 3, 64, 64)
    fused = rf.fuse(network(), example_inputs=x, release=True)
    with pytest.raises(RuntimeError, match="release=True"):
        fused.state_dict()


def test_a_file_of_weights_is_served_by_another_process(trained, tmp_path):
    model, x = trained(torchvision.models.resnet18()), torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad():
        torch.save({"x": x, "y": fused(x)}, tmp_path / "results.pt")
    torch.save(fused.state_dict(), tmp_path / "weights.pt")
    run_python(
        "import sys, torch, torchvision\n"
        "import resnet_fused as rf\n"
        "model = torchvision.models.resnet18().eval()\n"
        "model.load_state_dict(torch.load(sys.argv[1], weights_only=True))\n"
        "known, fused = torch.load(sys.argv[2], weights_only=True), rf.fuse(model)\n"
        "with torch.inference_mode():\n"
        "    torch.testing.assert_close(fused(known['x']), known['y'])\n",
        tmp_path / "weights.pt",
        tmp_path / "results.pt",
    )


# ---- torch.export -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # PyTorch's, of weights in channels_last
def test_exported_programs_are_served_by_another_process(trained, tmp_path):
    results = []
    for index, format in enumerate((torch.contiguous_format, torch.channels_last)):
        model = trained(network()).to(memory_format=format)
        batches = [torch.randn(n, 3, 40, 48).to(memory_format=format) for n in (4, 7)]
        with torch.no_grad():
            exported = torch.export.export(rf.fuse(model), (batches[0],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            results += [(model(x), copy.deepcopy(model).double()(x.double())) for x in batches]
        assert "resnet_fused.program.default" in {str(node.target) for node in exported.graph.nodes}
        torch.export.save(exported, tmp_path / f"model{index}.pt2")
        torch.save(batches, tmp_path / f"inputs{index}.pt")
    run_python(
        "import sys, torch\n"
        "import resnet_fused\n"
        "outputs = []\n"
        "with torch.no_grad():\n"
        "    for index in range(2):\n"
        "        module = torch.export.load(f'{sys.argv[1]}/model{index}.pt2').module()\n"
        "        outputs += [module(x) for x in torch.load(f'{sys.argv[1]}/inputs{index}.pt')]\n"
        "torch.save(outputs, f'{sys.argv[1]}/outputs.pt')\n",
        tmp_path,
    )
    for y, (want, truth) in zip(torch.load(tmp_path / "outputs.pt"), results, strict=True):
        assert y.stride() == want.stride()
        assert_as_good_as_stock(y, want, truth)


def test_an_exported_program_takes_a_checkpoint(trained):
    """Its parameters are the model's own, under their names."""
    model, other, x = trained(network()), trained(network()), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        module = torch.export.export(rf.fuse(model), (x,)).module()
        assert_same(module(x), model(x))
        module.load_state_dict(other.state_dict(), strict=False)
        assert_same(module(x), other(x))
