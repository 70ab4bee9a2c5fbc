"""The table in docs/guarantees.md of what can be done with a fused model: every row has a test here, which does it."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from support.kinds import assert_same, check, check_comes_back, counts, ops
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused as rf

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
X = torch.randn(2, 3, 40, 40)
TESTS: dict[str, Callable[..., None]] = {}


def _rows() -> list[str]:
    """First cells of the table."""
    section = PAGE.read_text().split("## What you can do with a fused model", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (.+?) \| .+ \|$", section, re.M)
    assert cells[0] == "what you do"
    return cells[1:]


def row(key: str):
    """Registers the test of a row, by the row's first cell."""

    def register(test):
        assert key not in TESTS
        TESTS[key] = test
        return test

    return register


def _network() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("key", _rows())
def test_row(key, trained, tmp_path):
    assert key in TESTS, "this row has no test"
    if X.is_cuda and key == "`quantize_dynamic`":
        pytest.skip("PyTorch quantizes dynamically on CPUs only; run it without --device")
    model = trained(_network())
    fused = rf.fuse(model)
    check(fused, model, X)
    TESTS[key](model, fused, tmp_path)


def test_every_test_has_a_row():
    assert {*_rows()} == {*TESTS}


@row("`model.train()` and train on")
def _train(model, fused, tmp_path):
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, fused)]
    for _ in range(2):
        losses = []
        for m, optimizer in zip((model, fused), optimizers, strict=True):
            m.train()
            optimizer.zero_grad()
            losses.append(m(X).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0])
    assert_same(fused.state_dict(), model.state_dict())
    check(fused.eval(), model.eval(), X)


@row("call it where a derivative may be asked for")
def _gradients(model, fused, tmp_path):
    before = counts(fused)
    gradients = []
    for m in (model, fused):
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in m.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counts(fused) == (before[0], before[1] + 1)
    check(fused, model, X)


@row("`load_state_dict` of a plain checkpoint")
def _checkpoint(model, fused, tmp_path):
    assert [*fused.state_dict()] == [*model.state_dict()]
    other = _network().eval()
    torch.save(other.state_dict(), tmp_path / "checkpoint.pt")
    fused.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True)
    check(fused, other, X)
    other.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(model.state_dict(), assign=True)
    check(fused, model, X)


@row("write parameters: optimizer, `.data`, numpy")
def _writes(model, fused, tmp_path):
    for m in (model, fused):
        m(X).sum().backward()
        torch.optim.SGD(m.parameters(), 1e-3).step()
    check(fused, model, X)
    for m in (model, fused):
        m.layer2[0].conv1.weight.data = m.layer2[0].conv1.weight.data.flip(0)
        m.bn1.running_mean.add_(0.5)
        if X.device.type == "cpu":  # where writes that PyTorch doesn't count are noticed as well
            m.layer1[0].conv1.weight.data.mul_(1.5)
            m.layer3[0].conv2.weight.detach().numpy()[:] *= 0.5
    check(fused, model, X)


@row("`.to(dtype)`, `.half()`, `.to(memory_format=…)`")
def _moves(model, fused, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        check(fused.to(dtype), model.to(dtype), X.to(dtype))
    check(fused.half(), model.half(), X.half())
    check(fused.float(), model.float(), X)
    check(fused.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last), X)


@row("register a forward hook on an inner module")
def _hooks(model, fused, tmp_path):
    for path in ("conv1", "bn1", "layer2.0.conv2", "layer2.0", "layer3.0.downsample.0", "relu", "fc"):
        seen: list[list[tuple]] = [[], []]
        handles = [
            m.get_submodule(path).register_forward_hook(
                lambda m, args, y, own=own: own.append((args[0].shape, args[0].stride(), y.shape, y.stride(), y.clone()))
            )
            for m, own in zip((model, fused), seen, strict=True)
        ]
        with torch.no_grad():
            assert_same(fused(X), model(X))
        assert len(seen[1]) == len(seen[0]) > 0
        assert_same(seen[1], seen[0])
        for handle in handles:
            handle.remove()
        check(fused, model, X)
        assert all(ops(fused))


@row("replace a module, such as the classifier")
def _replaces(model, fused, tmp_path):
    for name, make in {
        "fc": lambda: nn.Linear(512, 3),
        "relu": nn.Hardswish,
        "layer4": nn.Identity,
        "avgpool": lambda: nn.AdaptiveMaxPool2d(1),
        "conv1": lambda: nn.Conv2d(3, 64, 3, 2, 1, bias=False),
    }.items():
        new = make().eval()
        for m in (model, fused):
            setattr(m, name, copy.deepcopy(new))
            if name == "layer4":
                m.fc = nn.Linear(256, 3)
        fused.fc.load_state_dict(model.fc.state_dict())
        check(fused, model, X)
        check(fused, model, X)
        assert any(ops(fused))
    assert ops(fused)[1] == "basic_block"


@row("prune, parametrize, `weight_norm`")
def _pruned(model, fused, tmp_path):
    class Doubled(nn.Module):
        def forward(self, w):
            return w * 2

    changes = (
        lambda m: prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5),
        lambda m: parametrize.register_parametrization(m.layer2[0].conv1, "weight", Doubled()),
        lambda m: parametrizations.weight_norm(m.layer3[0].conv1),
        lambda m: nn.utils.weight_norm(m.layer4[0].conv1),
        lambda m: prune.remove(m.layer1[0].conv1, "weight"),
        lambda m: parametrize.remove_parametrizations(m.layer2[0].conv1, "weight"),
    )
    with torch.no_grad():
        for change in changes:
            for m in (model, fused):
                change(m)
            for _ in range(2):
                assert_same(fused(X), model(X))
    assert any(ops(fused))
    assert counts(fused) == (1 + 2 * len(changes), 0)


@row("`copy.copy`, `deepcopy`, `pickle`, `torch.save`")
def _copies(model, fused, tmp_path):
    torch.save(fused, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        check(other, model, X)
        assert ops(other) == ops(fused)
        with torch.no_grad():
            other.conv1.weight.zero_()
        check(fused, model, X)
    with torch.no_grad():
        assert_same(copy.copy(fused)(X), model(X))


@row("`torch.compile`, before or after `rf.fuse`")
def _compiled(model, fused, tmp_path):
    block, y = model.layer1[0], torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        want = block(y)
        after = torch.compile(rf.fuse(block), fullgraph=True, backend="aot_eager")
        assert_same(after(y), want)
        before = rf.fuse(torch.compile(block, fullgraph=True, backend="aot_eager"))
        assert_same(before(y), want)
        assert_same(torch.compile(fused, fullgraph=True, backend="aot_eager")(X), model(X))


@row("`torch.jit.trace`, `torch.jit.script`")
def _scripted(model, fused, tmp_path):
    with torch.no_grad():
        traced, scripted = torch.jit.trace(fused, X), torch.jit.script(fused)
        assert "resnet_fused::program" in str(traced.graph)
        assert "resnet_fused" not in str(scripted.inlined_graph)
        for made in (traced, scripted):
            assert_same(made(X), model(X))
    check(fused, model, X)


@row("`quantize_dynamic`")
def _quantized(model, fused, tmp_path):
    want, got = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8) for m in (model, fused))
    assert "quantized" in type(got.fc).__module__
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(got(X), want(X), rtol=0.05, atol=0.05)
    assert counts(got)[0] >= 2
    assert all(ops(got))
    check(fused, model, X)


@row("`create_feature_extractor`, timm's `forward_intermediates`")
def _features(model, fused, tmp_path):
    nodes = ["relu", "layer1.0.conv1", "layer2", "layer4.0.add"]
    with torch.no_grad():
        want, got = (create_feature_extractor(m, nodes)(X) for m in (model, fused))
        assert_same(got, want)
        again = rf.fuse(create_feature_extractor(fused, ["layer2", "layer4"]))
        assert_same(again(X), create_feature_extractor(model, ["layer2", "layer4"])(X))
        assert all(ops(again))
        timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'resnet_fused[test]'")
        for arguments in ({"num_classes": 5}, {"features_only": True}):
            network = timm.create_model("resnet18", **arguments).eval()
            own = rf.fuse(network)
            assert_same(own(X), network(X))
            if "num_classes" in arguments:
                assert_same(own.forward_intermediates(X), network.forward_intermediates(X))
                assert_same(own.forward_features(X), network.forward_features(X))
            assert all(ops(own))


@row("`DataParallel`, `DistributedDataParallel`, `share_memory`")
def _parallel(model, fused, tmp_path):
    with torch.no_grad():
        want = model(X)
        assert_same(nn.DataParallel(fused)(X), want)
        wrapped = rf.fuse(nn.DataParallel(model).eval())
        assert_same(wrapped(X), want)
    fused.share_memory()
    check(fused, model, X)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(fused)
        with torch.no_grad():
            assert_same(parallel(X), want)
        stock = nn.parallel.DistributedDataParallel(model)
        for m in (stock.train(), parallel.train()):
            m(X).square().mean().backward()
        gradients = [[p.grad for p in m.parameters()] for m in (model, fused)]
        assert_same(gradients[1], gradients[0])
    finally:
        torch.distributed.destroy_process_group()
    check(fused.eval(), model.eval(), X)


@row("count operations with `FlopCounterMode`")
def _flops(model, fused, tmp_path):
    found = []
    for m in (model, fused):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(X)
        found.append(counter.get_flop_counts())
    assert {**found[1]["Global"]} == {**found[0]["Global"]}
    assert {**found[1]} == {**found[0]}
    check_comes_back(fused, model, X)


@row("call it from several threads")
def _threads(model, fused, tmp_path):
    inputs = [torch.randn(1 + i % 2, 3, 33 + i, 40) for i in range(4)]

    @torch.no_grad()
    def call(x):
        return fused(x)

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for got, x in zip(pool.map(call, inputs * 2), inputs * 2, strict=True):
            assert_same(got, model(x))
    assert counts(fused) == (9, 0)


@row("`rf.unfuse(model)`")
def _unfused(model, fused, tmp_path):
    stock = copy.deepcopy(model)
    before = [(m, {**vars(m)}) for m in model.modules()]
    own = rf.fuse(model, inplace=True)
    assert own is model
    check(own, stock, X)
    assert rf.unfuse(own) is own
    for m, attributes in before:
        assert vars(m).keys() == attributes.keys()
        assert all(vars(m)[name] is value for name, value in attributes.items())
    with torch.no_grad():
        assert torch.equal(own(X), stock(X))
    with pytest.raises(ValueError, match="rf.fuse didn't make"):
        rf.report(own, file=io.StringIO())
    check(rf.fuse(own), stock, X)
