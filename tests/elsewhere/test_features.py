"""Features of fused models, and fused models of features: stock's values in stock's memory format, however they are taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from support.kinds import assert_same, ops
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused as rf

timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'resnet_fused[test]'")
features = pytest.importorskip("timm.models._features")
features_fx = pytest.importorskip("timm.models._features_fx")


class Formats(NamedTuple):
    """Of the model's weights and of the images."""

    model: torch.memory_format
    images: torch.memory_format


C, L = torch.contiguous_format, torch.channels_last
BOTH = [pytest.param(Formats(C, C), id="contiguous"), pytest.param(Formats(L, L), id="channels-last")]
MIXED = [
    pytest.param(Formats(C, L), id="contiguous-model-channels-last-images"),
    pytest.param(Formats(L, C), id="channels-last-model-contiguous-images"),
]


@pytest.fixture(params=BOTH)
def formats(request) -> Formats:
    return request.param


@pytest.fixture
def images(formats: Formats) -> Tensor:
    return torch.randn(2, 3, 40, 48).to(memory_format=formats.images)


def basic() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=5)


def bottleneck() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


@torch.no_grad()
def compare(got: Callable[[Tensor], Any], want: Callable[[Tensor], Any], images: Tensor) -> None:
    """Twice, since a fast path's first call is another than its later ones."""
    for _ in range(2):
        first, second = (copy.deepcopy(run(images.clone(memory_format=torch.preserve_format))) for run in (got, want))
        assert_same(first, second)


# What timm's models have beside their forward: of the network, the images, and the module that they are asked of.
METHODS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "forward_features": lambda net, x: net.forward_features(x),
    "forward_head": lambda net, x: net.forward_head(net.forward_features(x)),
    "forward_head-without-classifier": lambda net, x: net.forward_head(net.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda net, x: net.forward_intermediates(x),
    "forward_intermediates-of-some": lambda net, x: net.forward_intermediates(x, indices=[0, 2], norm=True),
    "forward_intermediates-until": lambda net, x: net.forward_intermediates(
        x, indices=[1], stop_early=True, intermediates_only=True
    ),
}


@pytest.mark.parametrize("formats", BOTH + MIXED)
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_timm(method, formats, images, trained):
    model = trained(basic()).to(memory_format=formats.model)
    fused = rf.fuse(model)
    compare(lambda x: METHODS[method](fused, x), lambda x: METHODS[method](model, x), images)
    compare(fused, model, images)  # and whatever the method left behind
    assert all(ops(fused))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "reset_classifier": lambda net: net.reset_classifier(0),
    "another-pool": lambda net: net.reset_classifier(0, "max"),
    "prune_intermediate_layers": lambda net: net.prune_intermediate_layers([1], prune_head=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_timm(change, formats, images, trained):
    model = trained(basic()).to(memory_format=formats.model)
    fused = rf.fuse(model)
    compare(fused, model, images)
    for net in (model, fused):
        CHANGES[change](net)
    compare(fused, model, images)
    assert all(ops(fused))


# timm's wrappers that give features, by the name that create_model has for them.
WRAPPERS = {
    "list": features.FeatureListNet,
    "dict": features.FeatureDictNet,
    "hook": features.FeatureHookNet,
    "getter": features.FeatureGetterNet,
    "fx": features_fx.FeatureGraphNet,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_features_only_of_timm(kind, formats, images, trained):
    model = trained(
        timm.create_model("resnet18", layers=(1, 1, 1, 1), features_only=True, feature_cls=kind, out_indices=(1, 2, 4))
    )
    fused = rf.fuse(model.to(memory_format=formats.model))
    compare(fused, model, images)
    assert all(ops(fused))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_of_timm_around_a_fused_model(kind, formats, images, trained):
    model = trained(basic()).to(memory_format=formats.model)
    fused = rf.fuse(model)
    wrapped, stock = (WRAPPERS[kind](copy.deepcopy(net), out_indices=(1, 2, 4)).eval() for net in (fused, model))
    compare(wrapped, stock, images)
    again = rf.fuse(wrapped)
    compare(again, stock, images)
    assert all(ops(again))


# Values in the midst of what is fused: of a stem, of a block, its sum, and the ends of stages.
NODES = {
    "stem": ["conv1", "bn1", "relu", "maxpool"],
    "block": ["layer2.0.conv1", "layer2.0.bn2", "layer2.0.relu_1", "layer2.0.downsample.1", "layer2.0.add", "layer2.0.relu_2"],
    "stages": ["layer1", "layer2", "layer4"],
    "head": ["layer4", "avgpool", "flatten", "fc"],
}


@pytest.mark.parametrize("formats", BOTH + MIXED)
@pytest.mark.parametrize("nodes", NODES)
def test_extractors_of_torchvision(nodes, formats, images, trained):
    model = trained(bottleneck()).to(memory_format=formats.model)
    stock = create_feature_extractor(model, NODES[nodes])
    of_fused = create_feature_extractor(rf.fuse(model), NODES[nodes])
    compare(of_fused, stock, images)
    for fused in (rf.fuse(stock), rf.fuse(of_fused)):
        compare(fused, stock, images)
        # Where each value between two layers is asked for, their sums are still fused with the batch norms.
        assert any(ops(fused))


def test_layer_getters_of_torchvision(formats, images, trained):
    model = trained(bottleneck()).to(memory_format=formats.model)
    layers = {"relu": "stem", "layer1": "a", "layer3": "b"}
    stock = IntermediateLayerGetter(model, layers)
    compare(IntermediateLayerGetter(rf.fuse(model), layers), stock, images)
    fused = rf.fuse(stock)
    compare(fused, stock, images)
    assert all(ops(fused))


def collect(model: nn.Module, images: Tensor, paths: tuple[str, ...]) -> dict[str, Any]:
    """Inputs and results of modules inside of a model, by hooks that are there for one call."""
    found: dict[str, Any] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path)

        def before(module, args, path=path):
            found[f"{path} in"] = copy.deepcopy(args[0])

        def after(module, args, result, path=path):
            found[f"{path} out"] = copy.deepcopy(result)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    found["result"] = model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "paths",
    [
        ("conv1", "bn1", "relu", "maxpool"),
        ("layer2.0.conv1", "layer2.0.bn2", "layer2.0"),
        ("layer1", "layer4"),
        ("avgpool", "fc"),
    ],
    ids=["stem", "block", "stages", "head"],
)
def test_hooks(paths, formats, images, trained):
    model = trained(bottleneck()).to(memory_format=formats.model)
    fused = rf.fuse(model)
    compare(fused, model, images)
    compare(lambda x: collect(fused, x, paths), lambda x: collect(model, x, paths), images)
    compare(fused, model, images)
    assert all(ops(fused))


def test_backbones_of_torchvision(formats, images, trained):
    """A feature pyramid takes features by an IntermediateLayerGetter from within a larger model."""
    make = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    model = trained(make(backbone_name="resnet18", weights=None)).to(memory_format=formats.model)
    fused = rf.fuse(model)
    compare(lambda x: {**fused(x)}, lambda x: {**model(x)}, images)
    assert all(ops(fused))
