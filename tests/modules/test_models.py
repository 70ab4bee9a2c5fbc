"""The factories: torchvision's structure and checkpoints, other channels and classes, conversion of plain state dicts."""

from __future__ import annotations

import pytest
import torch
import torchvision
from support.plain_resnet import PlainResNet
from support.tolerances import relative_error

import resnet_fused as rf

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
NAMES += ["wide_resnet50_2", "wide_resnet101_2"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_torchvisions(name):
    with torch.device("meta"):
        mine, theirs = getattr(rf, name)(), torchvision.models.get_model(name)
    a, b = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (mine, theirs))
    assert a == b
    assert list(a) == list(b)


def test_checkpoints_load_both_ways(trained):
    theirs, mine = trained(torchvision.models.resnet18(num_classes=7)), rf.resnet18(num_classes=7).eval()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(mine(x), theirs(x).double()) < 2e-6
    theirs.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_zeroes_what_torchvisions_does(name):
    zero = []
    for models in (rf, torchvision.models):
        model = getattr(models, name)(zero_init_residual=True)
        zero.append([path for path, p in model.named_parameters() if path.endswith("weight") and not p.any()])
    assert zero[0] == zero[1] != []


def test_zero_init_residual_leaves_norms_without_weight_alone():
    model = rf.resnet18(zero_init_residual=True, norm_layer=lambda channels: torch.nn.BatchNorm2d(channels, affine=False))
    assert model.layer1[0].bn2.weight is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_classes(channels):
    model = rf.resnet18(num_classes=5, in_channels=channels).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_plain_state_dicts_convert(bottleneck, trained):
    widths = (64, 128, 256, 512)
    plain = trained(PlainResNet(bottleneck, widths, classes=10))
    block = rf.Bottleneck if bottleneck else rf.BasicBlock
    mine = rf.ResNet(block, [2, 2, 2, 2], num_classes=10, pool_padding=0).eval()
    mine.load_state_dict(rf.convert_state_dict(plain.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(mine(x), plain(x).double()) < 2e-6


def test_torchvision_keys_pass_and_foreign_keys_are_named():
    state = rf.resnet18().state_dict()
    assert rf.convert_state_dict(state) == state
    with pytest.raises(ValueError, match=r"has the key 'stem.conv.weight'"):
        rf.convert_state_dict({"stem.conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"has the key 'stacklayers\.99\.weight'"):
        rf.convert_state_dict({"stacklayers.99.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_classes": 0}, "num_classes is 0; it must be a positive integer"),
        ({"in_channels": 2.5}, "in_channels is 2.5"),
        ({"replace_stride_with_dilation": (True,)}, "4 and 3 elements"),
    ],
    ids=["classes", "channels", "dilation"],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.resnet18(**arguments)
