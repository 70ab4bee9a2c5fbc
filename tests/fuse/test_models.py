"""rf.fuse on the models that it is for: the same results, and nothing left unfused that should have been."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from plain_resnet import PlainResNet
from tolerances import assert_as_good_as_stock
from torch import nn
from torch.utils.mkldnn import to_mkldnn
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused as rf
from resnet_fused.modules import FusedBlock, FusedModule, FusedStem

timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'resnet_fused[test]'")
tv = torchvision.models
leaves = torch.utils._pytree.tree_leaves


def _rows(model):
    return rf.report(model, file=io.StringIO()).rows


def _small(block, layers=(1, 1, 1, 1), **kwargs):
    return tv.ResNet(block, list(layers), num_classes=10, **kwargs)


TV_BASIC, TV_BOTTLENECK = tv.resnet.BasicBlock, tv.resnet.Bottleneck
# model, number of fused blocks, whether it has a fused stem
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
        assert a.is_contiguous() == b.is_contiguous()
    assert sum(isinstance(m, FusedBlock) for m in fused.modules()) == blocks
    assert any(isinstance(m, FusedStem) for m in fused.modules()) == stem
    assert all(row.op for row in _rows(fused)), "a convolution was left as it was"
    assert type(fused) is type(model)


def test_a_feature_extractor_keeps_its_mode(trained):
    """A deepcopy of one comes out in training mode."""
    model = create_feature_extractor(trained(_small(TV_BASIC)), ["layer2", "layer4"])
    x = torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad():
        want, got = model(x), fused(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert all(row.op for row in _rows(fused))
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
    assert any(isinstance(m, FusedModule) for m in fused.modules())
    for row in _rows(fused):
        assert row.op or row.note, f"{row.conv} is not fused, and nothing says why"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_width_models(dtype, trained):
    model = trained(_small(TV_BOTTLENECK)).to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    fused = rf.fuse(model)
    with torch.no_grad():
        assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_autocast_is_as_good_as_stock_and_leaves_the_weights_alone(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(2, 3, 64, 64)
    fused = rf.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), model(x)
    assert_as_good_as_stock(got, want, copy.deepcopy(model).double()(x.double()))
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
            assert got.is_contiguous(memory_format=torch.channels_last) == want.is_contiguous(memory_format=torch.channels_last)
            assert got.is_contiguous() == want.is_contiguous()


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
    y = rf.fuse(model)(x.to_mkldnn().requires_grad_())  # by the registered operators
    assert_as_good_as_stock(y.detach().to_dense(), want.to_dense(), truth)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float64], ids=str)
def test_autocast_casts_no_more_than_in_stock(dtype, trained):
    model = trained(_small(TV_BASIC))
    x = (torch.rand(1, 3, 64, 64) * 255).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            model(x)
        with pytest.raises(ValueError, match=f"x has dtype {dtype} and the weight torch.float32"):
            rf.fuse(model)(x)


def test_copies_pickles_saves_and_moves(trained, tmp_path):
    fused = rf.fuse(trained(_small(TV_BOTTLENECK)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = fused(x)
        torch.save(fused, tmp_path / "model.pt")
        copies = [
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
        for other in copies:
            assert torch.equal(other(x), want)
            assert len(_rows(other)) == len(_rows(fused))
        state = {k: torch.zeros_like(v) for k, v in fused.state_dict().items()}
        fused.load_state_dict(state)
        assert torch.equal(fused(x), torch.zeros_like(want)), "packed weights were not dropped with the old parameters"
        fused.load_state_dict(copies[0].state_dict())
        assert torch.equal(fused(x), want)
        moved = fused.to(torch.bfloat16)
        assert moved(x.bfloat16()).dtype == torch.bfloat16
        assert not any("packed" in key or "runner" in key for key in fused.state_dict())


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
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert "resnet_fused.basic_block.default" in targets
    assert "resnet_fused.stem.default" in targets


def test_gradient_by_the_input(trained):
    model = trained(_small(TV_BOTTLENECK))
    fused = rf.fuse(model)
    grads = []
    for m in (model, fused, copy.deepcopy(model).double()):
        x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).to(next(m.parameters()).dtype).requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    stock, ours, truth = grads
    assert_as_good_as_stock(ours, stock, truth)


def test_weights_take_little_more_than_twice_the_memory(trained):
    for make in (tv.resnet18, tv.resnet50):
        fused = rf.fuse(trained(make()))
        with torch.no_grad():
            fused(torch.randn(1, 3, 224, 224))
            fused(torch.randn(2, 3, 96, 128))  # another shape needs no other packing
        report = rf.report(fused, file=io.StringIO())
        assert report.packed_bytes > 0
        assert report.fused_bytes + report.packed_bytes <= 2.2 * report.stock_bytes, str(report).splitlines()[-1]


class Mixed(nn.Module):
    """Fused and unfused parts, with parameters that are tied, and one that is a view of another's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1)
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.view = nn.Parameter(self.head.bias.detach()[:4])
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bare(self.bn(self.conv(x)).relu()).relu().mean((2, 3))
        return self.tied(self.head(x) * self.scale) + self.view.sum()


def test_a_fused_model_shares_no_memory_with_the_original_and_keeps_ties():
    model = Mixed().eval()
    fused = rf.fuse(model)
    tensors = [{t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, fused)]
    assert not tensors[0] & tensors[1]
    assert fused.tied.weight is fused.head.weight
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want = fused(x)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        torch.testing.assert_close(fused(x), want)


def test_fusing_copies_no_weight_that_it_folds(monkeypatch):
    """The original and the folded weights are in memory at once, and nothing else of their size."""
    copied = []
    deepcopy = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.shape) or deepcopy(self, memo))
    model = torchvision.models.resnet18().eval()
    fused = rf.fuse(model)
    assert sorted(copied) == sorted(p.shape for p in fused.fc.parameters())
    assert fused.fc.weight.data_ptr() != model.fc.weight.data_ptr()


def test_fuse_leaves_the_original_alone_unless_inplace(trained):
    model = trained(_small(TV_BASIC))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rf.fuse(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, FusedModule) for m in model.modules())
    assert rf.fuse(model, inplace=True) is model
    assert any(isinstance(m, FusedModule) for m in model.modules())


def test_fusing_twice_and_under_inference_mode(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        fused = rf.fuse(model)
        want = fused(x)
        again = rf.fuse(fused)
        assert torch.equal(again(x), want)
        others = [again, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).bfloat16()]
        for other in (fused, *others):
            for module in other.modules():
                if isinstance(module, FusedModule):
                    assert not any(p.is_inference() for p in module.parameters())


def test_exact_precision_and_explicit_backends_agree(trained):
    model = trained(_small(TV_BASIC))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, truth = model(x), copy.deepcopy(model).double()(x.double())
        assert_as_good_as_stock(rf.fuse(model, precision="exact")(x), want, truth)
        for backend in ("onednn", "reference"):
            fused = rf.fuse(model, backend=backend)
            assert_as_good_as_stock(fused(x), want, truth)
            report = rf.report(fused, file=io.StringIO())
            assert set(report.backends.values()) <= {backend, ""}


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


def test_verify_compares_block_by_block(trained):
    model = trained(_small(TV_BASIC))
    fused = rf.fuse(model)
    x = torch.randn(2, 3, 64, 64)
    result = rf.verify(model, fused, x)
    assert result.passed
    assert [e.layer for e in result.layers] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0", "result"]
    with torch.no_grad():
        fused.layer2[0].conv2.weight.mul_(1.01)
    worse = rf.verify(model, fused, x)
    assert not worse.passed
    assert worse.layers[0].fused < 1e-5 < worse.layers[1].fused
    assert "FAILED" in str(worse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_result(trained, dtype):
    model = trained(_small(TV_BASIC)).to(dtype)
    fused, x = rf.fuse(model), torch.randn(2, 3, 64, 64).to(dtype)
    want = fused(x)
    empty = fused(x[:0])
    assert empty.shape == model(x[:0]).shape
    assert empty.dtype == dtype
    assert torch.equal(fused(x), want)
