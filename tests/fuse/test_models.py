"""rf.fuse on the models that it is for: the same model with the same results, and nothing unfused that should have been."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from support.fast_paths import assert_same_model, needs_kernels, ops, report, rows, runs
from support.plain_resnet import PlainResNet
from support.tolerances import assert_as_good_as_stock
from torch import nn
from torch.utils.mkldnn import to_mkldnn
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused as rf
from resnet_fused.backends.processor import processor
from resnet_fused.fusion.rows import path_of

timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'resnet_fused[test]'")
tv = torchvision.models
leaves = torch.utils._pytree.tree_leaves


def _small(block, layers=(1, 1, 1, 1), **kwargs):
    return tv.ResNet(block, list(layers), num_classes=10, **kwargs)


TV_BASIC, TV_BOTTLENECK = tv.resnet.BasicBlock, tv.resnet.Bottleneck
# model, number of blocks that are one op, whether it has a fused stem
MODELS = {
    "torchvision-resnet18": (lambda: tv.resnet18(num_classes=10), 8, True),
    "torchvision-resnet50": (lambda: tv.resnet50(num_classes=10), 16, True),
    "torchvision-resnext": (lambda: _small(TV_BOTTLENECK, groups=32, width_per_group=4), 4, True),
    "torchvision-wide": (lambda: _small(TV_BOTTLENECK, width_per_group=128), 4, True),
    "torchvision-dilated": (lambda: _small(TV_BOTTLENECK, replace_stride_with_dilation=[False, True, True]), 4, True),
    "torchvision-frozen-bn": (lambda: _small(TV_BOTTLENECK, norm_layer=torchvision.ops.FrozenBatchNorm2d), 4, True),
    "torchvision-with-our-blocks": (lambda: _small(rf.Bottleneck), 4, True),
    "ours": (lambda: rf.resnet18(num_classes=10, in_channels=1), 8, True),
    "timm-resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 8, True),
    "timm-resnet26d": (lambda: timm.create_model("resnet26d", num_classes=10), 5, True),  # three pool in the shortcut
    "timm-features": (
        lambda: timm.create_model("resnet18", features_only=True),
        8,
        False,
    ),  # what enters the pool is a result too
    "plain-basic": (lambda: PlainResNet(), 4, True),
    "plain-bottleneck": (lambda: PlainResNet(bottleneck=True), 4, True),
    "backbone-of-a-detector": (
        lambda: tv._utils.IntermediateLayerGetter(_small(TV_BASIC), {"layer2": "a", "layer4": "b"}),
        4,
        True,
    ),
}


@pytest.mark.parametrize("make, blocks, stem", MODELS.values(), ids=MODELS)
def test_residual_networks_are_fused_whole(make, blocks, stem, trained):
    model = trained(make())
    channels = 1 if isinstance(model, rf.ResNet) else 3
    x = torch.randn(2, channels, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad():
        want, got = leaves(model(x)), leaves(fused(x))
        truth = leaves(copy.deepcopy(model).double()(x.double()))
    for a, b, t in zip(got, want, truth, strict=True):
        assert_as_good_as_stock(a, b, t)
        assert a.stride() == b.stride()
    assert ops(fused)["basic_block"] + ops(fused)["bottleneck"] == blocks
    assert ops(fused)["stem"] == stem
    assert all(row.op for row in rows(fused)), "a convolution was left as it was"
    assert report(fused).calls_fused == 1
    assert_same_model(fused, model)
    assert repr(rf.unfuse(fused)) == repr(model)


SPOILT = {
    "basic": lambda: _small(TV_BASIC),
    "bottleneck": lambda: _small(TV_BOTTLENECK),
    "plain": PlainResNet,
    "ours": lambda: _small(rf.BasicBlock),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("make", SPOILT.values(), ids=SPOILT)
@torch.no_grad()
def test_nan_and_infinity_are_where_stock_has_them(make, value, trained):
    """In a stage's result, where most of the image is far from the spoilt pixel, and in the other image of the batch."""
    model = trained(make())
    layers = [*model.stacklayers] if isinstance(model, PlainResNet) else [*model.children()]
    stage = nn.Sequential(*layers[: 5 if isinstance(model, PlainResNet) else 6])
    fused = rf.fuse(stage.eval())
    x = torch.randn(2, 3, 96, 80)
    x[1, 1, 20, 30] = value
    for format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=format)
        got, want = fused(given), stage(given)
        assert not want.isfinite().all()
        assert want.isfinite().any()
        for of_kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(of_kind(got), of_kind(want))
        finite = want.isfinite()
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-3, atol=1e-3)
        assert got.stride() == want.stride()
    assert report(fused).calls_fused == 2


def test_a_feature_extractor_keeps_its_mode(trained):
    """A deepcopy of one comes out in training mode."""
    model = create_feature_extractor(trained(_small(TV_BASIC)), ["layer2", "layer4"])
    x = torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad():
        want, got = model(x), fused(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert all(row.op for row in rows(fused))
    assert max(layer.stock for layer in rf.verify(model, fused, x).layers) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: tv.vgg11_bn(num_classes=10),
        lambda: tv.mobilenet_v2(num_classes=10),
        lambda: tv.regnet_y_400mf(num_classes=10),
        lambda: tv.googlenet(num_classes=10, init_weights=False, aux_logits=False),
        lambda: timm.create_model("seresnet18", num_classes=10),
        lambda: timm.create_model("resnetblur18", num_classes=10),
    ],
    ids=["vgg-bn", "mobilenet-relu6", "regnet-se", "googlenet-functional-relu", "se-resnet", "anti-aliased"],
)
def test_other_networks_keep_their_results(make, trained):
    model = trained(make())
    x = torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad():
        assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert runs(fused), "nothing was fused"
    assert_same_model(fused, model)
    for row in rows(fused):
        assert row.op or row.note, f"{row.conv} is not fused, and nothing says why"
        assert row.note != type(row).note, f"{row.conv} is called, and the report says that it isn't"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_width_models(dtype, trained):
    model = trained(_small(TV_BOTTLENECK)).to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    fused = rf.fuse(model)
    with torch.no_grad():
        assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert report(fused).calls_fused == 1


@needs_kernels
@pytest.mark.parametrize("make", [tv.resnet18, tv.resnet50])
@torch.no_grad()
def test_whole_models_in_float16_are_our_kernels(make, trained):
    model, x = trained(make(num_classes=10)).half(), torch.randn(2, 3, 64, 64).half()
    fused = rf.fuse(model)
    assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    served = {backend for run in runs(fused) for _, backend in run.problems.values()}
    # Where the CPU multiplies float16 itself, stock comes first.
    assert served == {"cpu"} or processor().multiplies("float16")


def test_autocast_is_as_good_as_stock_and_leaves_the_weights_alone(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), model(x)
    assert_as_good_as_stock(got, want, copy.deepcopy(model).double()(x.double()))
    assert report(fused).calls_fused == 1
    assert all(p.dtype == torch.float32 for p in fused.parameters())
    with torch.no_grad():
        assert fused(x).dtype == torch.float32


def test_channels_last_models_and_inputs(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(2, 3, 64, 64)
    for weights in (torch.contiguous_format, torch.channels_last):
        features = tv._utils.IntermediateLayerGetter(model.to(memory_format=weights), {"layer3": "y"}).eval()
        fused = rf.fuse(features)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            with torch.no_grad():
                got, want = fused(given)["y"], features(given)["y"]
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert report(fused).calls_fused == 2


@pytest.mark.cpu
@pytest.mark.parametrize("block", [TV_BASIC, TV_BOTTLENECK], ids=["basic", "bottleneck"])
def test_inputs_in_onednn_layout(block, trained):
    model = trained(_small(block))
    features = tv._utils.IntermediateLayerGetter(model, {"layer3": "y"}).eval()
    x = torch.randn(2, 3, 64, 64)
    given = x.to_mkldnn()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        want = model(given)
        for fused in (rf.fuse(model), rf.fuse(model, backend="reference"), to_mkldnn(rf.fuse(model))):
            y = fused(given)
            assert y.layout == want.layout == torch._mkldnn
            assert_as_good_as_stock(y.to_dense(), want.to_dense(), truth)
        torch.testing.assert_close(rf.fuse(features)(given)["y"].to_dense(), features(given)["y"].to_dense())
    y = rf.fuse(model)(x.to_mkldnn().requires_grad_())
    assert_as_good_as_stock(y.detach().to_dense(), want.to_dense(), truth)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float64], ids=str)
def test_autocast_casts_no_more_than_in_stock(dtype, trained):
    model = trained(_small(TV_BASIC))
    x = (torch.rand(1, 3, 64, 64) * 255).to(dtype)
    fused = rf.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError) as error:
            model(x)
        with pytest.raises(RuntimeError) as ours:
            fused(x)
    assert type(ours.value) is type(error.value)
    assert str(ours.value) == str(error.value)


AGAIN = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "copy": lambda model, path: copy.copy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, path: torch.save(model, path) or torch.load(path, weights_only=False),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
@torch.no_grad()
def test_copies_and_saved_models_are_fused_models(again, trained, tmp_path):
    model = trained(_small(TV_BOTTLENECK))
    fused, x = rf.fuse(model), torch.randn(1, 3, 64, 64)
    want = fused(x)
    other = again(fused, tmp_path / "model.pt")
    torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-5)
    assert_same_model(other, model)
    assert torch.equal(fused(x), want)
    if again is not AGAIN["copy"]:  # a shallow copy has the modules of the original, and runs them
        assert torch.equal(other(x), want)
        assert [row.op for row in rows(other)] == [row.op for row in rows(fused)]
        assert report(other).calls_fused == 2
        other.conv1.weight.mul_(2)
        assert torch.equal(fused(x), want), "the copy shares the original's weights"
        torch.testing.assert_close(other(x), rf.unfuse(copy.deepcopy(other))(x), rtol=1e-3, atol=1e-4)


def test_saves_loads_and_moves(trained):
    model = trained(_small(TV_BOTTLENECK))
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = fused(x)
        fused.load_state_dict({k: torch.zeros_like(v) for k, v in fused.state_dict().items()})
        assert torch.equal(fused(x), torch.zeros_like(want)), "packed weights were not dropped with the old parameters"
        fused.load_state_dict(model.state_dict())
        assert torch.equal(fused(x), want)
        moved = fused.to(torch.bfloat16)
        assert moved(x.bfloat16()).dtype == torch.bfloat16
        assert report(fused).calls_stock == 0
    stock = _small(TV_BOTTLENECK)
    assert not any(stock.load_state_dict(fused.state_dict())), "a checkpoint of the fused model isn't stock's"


def test_compiles_without_a_graph_break_and_exports(trained):
    model = trained(_small(TV_BASIC, (1, 1, 1, 1)))
    fused = rf.fuse(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = fused(x)
        truth = copy.deepcopy(model).double()(x.double())
        compiled = torch.compile(fused, fullgraph=True)
        assert_as_good_as_stock(compiled(x), want, truth)
        exported = torch.export.export(fused, (x,))
        assert_as_good_as_stock(exported.module()(x), want, truth)
        fused.layer1[0].conv1.weight.mul_(-1)  # which a compiled model follows
        torch.testing.assert_close(compiled(x), rf.unfuse(copy.deepcopy(fused))(x), rtol=1e-3, atol=1e-4)
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert "resnet_fused.program.default" in targets
    assert not any("conv2d" in target or "batch_norm" in target for target in targets)
    assert sorted(exported.state_dict) == sorted(model.state_dict())


def test_derivatives_are_stocks(trained):
    """By the input and by the parameters: bit by bit, since stock computes them."""
    model = trained(_small(TV_BOTTLENECK))
    fused = rf.fuse(model)
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        fused(x)
    for needed in ("input", "parameters", "both"):
        grads = []
        for m in (model, fused):
            m.requires_grad_(needed != "input").zero_grad()
            given = x.clone().requires_grad_(needed != "parameters")
            m(given).square().sum().backward()
            grads.append([given.grad, *(p.grad for p in m.parameters())])
        for ours, stock in zip(*grads, strict=True):
            assert ours is stock is None or torch.equal(ours, stock)
    assert "a derivative may be asked for" in report(fused).reason


def test_training_and_back(trained):
    """A fused model trains as stock does, and serves what it has learnt."""
    model = trained(_small(TV_BASIC))
    fused, x = rf.fuse(model), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = fused(x)
    for m in (model, fused):
        torch.manual_seed(1)
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        m.eval()
    for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        got, want = fused(x), model(x)
        assert not torch.allclose(want, before, rtol=1e-2)
        assert_as_good_as_stock(got, want, copy.deepcopy(model).double()(x.double()))
    assert report(fused).calls_fused == 2


@torch.no_grad()
def test_a_trunk_of_a_model_in_eval_mode_is_served_though_it_is_in_training_mode_itself(trained):
    """Modules that people put around a model's children are new ones, which are in training mode until someone calls eval."""
    trunk = nn.Sequential(*[*trained(_small(TV_BASIC)).children()][:-2])
    assert trunk.training
    fused, x = rf.fuse(trunk), torch.randn(1, 3, 64, 64)
    got, want = fused(x), trunk(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (report(fused).calls_fused, report(fused).calls_stock) == (1, 0)
    assert ops(fused) == {"stem": 1, "basic_block": 4}
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend=backend)(x), want, rtol=1e-4, atol=1e-5)
    assert "resnet_fused.program.default" in targets
    fused.train(), trunk.train()
    torch.testing.assert_close(fused(x), trunk(x))
    assert report(fused).calls_fused == 1
    for a, b in zip(fused.buffers(), trunk.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    fused.eval(), trunk.eval()
    torch.testing.assert_close(fused(x), trunk(x), rtol=1e-4, atol=1e-5)
    assert report(fused).calls_fused == 2


def test_fusing_twice_and_under_inference_mode(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        fused = rf.fuse(model)
        want = fused(x)
        again = rf.fuse(fused)
        assert torch.equal(again(x), want)
        for other in (fused, again):
            assert path_of(other).previous is None, "a fast path stands on another one"
            assert report(other).calls_stock == 0
            assert not any(t.is_inference() for t in (*other.parameters(), *other.buffers()))
        # Copies that are made here don't count their changes, as stock's don't, so they can't be served.
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).bfloat16()):
            plain = rf.unfuse(copy.deepcopy(other))
            given = x.to(other.fc.weight.dtype)
            for _ in range(2):
                assert torch.equal(other(given), plain(given))
                other.conv1.weight.mul_(-1), plain.conv1.weight.mul_(-1)
            assert "parameters were made under torch.inference_mode" in report(other).reason
        moved = fused.to(torch.bfloat16)
        torch.testing.assert_close(moved(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)
    assert repr(rf.unfuse(again)) == repr(model)


def test_exact_precision_and_explicit_backends_agree(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, truth = model(x), copy.deepcopy(model).double()(x.double())
        assert_as_good_as_stock(rf.fuse(model, precision="direct")(x), want, truth)
        for backend in ("onednn", "reference") if x.device.type == "cpu" else ("cuda", "reference"):
            if backend not in rf.available_backends():
                continue
            fused = rf.fuse(model, backend=backend)
            assert_as_good_as_stock(fused(x), want, truth)
            assert {row.backends for row in rows(fused)} == {backend}


def test_several_threads_share_one_model(trained):
    from concurrent.futures import ThreadPoolExecutor

    fused = rf.fuse(trained(_small(TV_BASIC)))
    inputs = [torch.randn(1 + i % 2, 3, 64, 64) for i in range(8)]
    with torch.no_grad():
        want = [copy.deepcopy(fused)(x) for x in inputs]

    def call(x):
        with torch.no_grad():
            return fused(x)

    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(call, inputs * 3), want * 3, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert report(fused).calls_stock == 0


def test_verify_compares_block_by_block(trained):
    model = trained(_small(TV_BASIC))
    fused = rf.fuse(model)
    x = torch.randn(2, 3, 64, 64)
    result = rf.verify(model, fused, x)
    assert result.passed
    assert report(fused).calls_stock == 0
    assert [e.layer for e in result.layers] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0", "result"]
    with torch.no_grad():
        fused.layer2[0].conv2.weight.mul_(1.01)
    worse = rf.verify(model, fused, x)
    assert not worse.passed
    assert worse.layers[0].fused < 1e-5 < worse.layers[1].fused
    assert "FAILED" in str(worse)


class Unit(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)


class BlockOfUnits(nn.Module):
    """Whose layers have names of the same form, as timm's RegNets'."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = Unit(), Unit()

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


def test_verify_finds_blocks_of_units(trained):
    model = trained(nn.Sequential(BlockOfUnits(), BlockOfUnits()))
    result = rf.verify(model, rf.fuse(model), torch.randn(2, 8, 9, 9))
    assert [e.layer for e in result.layers] == ["0", "1", "result"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_result(trained, dtype):
    model = trained(_small(TV_BASIC)).to(dtype)
    fused, x = rf.fuse(model), torch.randn(2, 3, 64, 64).to(dtype)
    want = fused(x)
    empty, stocks = fused(x[:0]), model(x[:0])
    assert (empty.shape, empty.stride(), empty.dtype) == (stocks.shape, stocks.stride(), dtype)
    assert torch.equal(fused(x), want)
