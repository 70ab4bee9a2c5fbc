"""The zoo: models of many families, of torchvision, timm and our own, for `resnet-fused bench --zoo`. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from resnet_fused.bench.options import UserError
from resnet_fused.bench.workloads import settle


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: such as "timm/resnet50d": the library that makes it, or "own", and its name there.
        family: such as "ResNet".
        create: makes it, without weights of a training.
        size: height and width of its images, pixels; of signals their length, of videos frames, height and width.
        channels: of its images.
    """

    name: str
    family: str
    create: Callable[[], nn.Module]
    size: tuple[int, ...] = (224, 224)
    channels: int = 3

    @property
    def package(self) -> str:
        """What must be installed for it."""
        source = self.name.split("/")[0]
        return "torchvision" if source == "own" else source

    @property
    def residual(self) -> bool:
        return self.family in _RESIDUAL


# Names of models, by family. The second list has the families whose blocks are not residual.
_TORCHVISION_RESIDUAL = {
    "ResNet": "resnet18 resnet34 resnet50 resnet101",
    "Wide-ResNet": "wide_resnet50_2",
    "ResNeXt": "resnext50_32x4d",
    "RegNet": "regnet_x_400mf regnet_x_3_2gf regnet_y_400mf",
    "ConvNeXt": "convnext_tiny",
}
_TORCHVISION_OTHERS = {
    "VGG": "vgg11 vgg16_bn",
    "AlexNet": "alexnet",
    "SqueezeNet": "squeezenet1_1",
    "DenseNet": "densenet121",
    "MobileNet": "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large",
    "EfficientNet": "efficientnet_b0 efficientnet_v2_s",
    "MNASNet": "mnasnet1_0",
    "ShuffleNet": "shufflenet_v2_x1_0",
}
_TIMM_RESIDUAL = {
    "ResNet": "resnet10t resnet26 resnet50_gn",
    "ResNet-D": "resnet18d resnet26t resnet50d",
    "Anti-aliased ResNet": "resnetaa50d resnetblur18 resnetblur50",
    "SE-ResNet": "seresnet18 seresnet50 legacy_seresnet50 seresnext50_32x4d",
    "ECA-ResNet": "ecaresnet26t ecaresnetlight ecaresnet50d",
    "GC-ResNet": "gcresnet33ts",
    "SK-ResNet": "skresnet18 skresnet50",
    "ResNeSt": "resnest14d resnest50d",
    "ResNet-RS": "resnetrs50",
    "ResNeXt": "resnext26ts resnext50d_32x4d",
    "Res2Net": "res2net50_26w_4s res2next50",
    "RegNet": "regnetx_004 regnetx_032 regnety_004 regnety_032 regnetz_b16",
    "ResNetV2": "resnetv2_18 resnetv2_50 resnetv2_50d",
    "CSP": "cspresnet50 cspresnext50 cspdarknet53",
    "Darknet": "darknet53",
    "DLA": "dla34 dla60",
    "HRNet": "hrnet_w18_small",
    "GerNet": "gernet_s",
    "TResNet": "tresnet_m",
    "Xception": "xception41",
    "Inception-ResNet": "inception_resnet_v2",
    "ConvNeXt": "convnext_atto",
}
_TIMM_OTHERS = {
    "VoVNet": "vovnet39a ese_vovnet19b_dw ese_vovnet39b",
    "RepVGG": "repvgg_a0 repvgg_b0",
    "MobileNet": "mobilenetv2_100 mobilenetv3_large_100 lcnet_100",
    "MobileOne": "mobileone_s0",
    "EfficientNet": "efficientnet_b0 tf_efficientnetv2_b0 tinynet_a",
    "MixNet": "mixnet_s",
    "FBNet": "fbnetc_100",
    "RexNet": "rexnet_100",
    "GhostNet": "ghostnet_100 repghostnet_100",
    "SelecSLS": "selecsls42b",
    "HGNet": "hgnetv2_b0",
    "DPN": "dpn68",
    "Inception": "inception_v4",
}
_OWN_RESIDUAL = {"CIFAR-ResNet", "Segmentation ResNet", "ResNet-FPN", "1-d ResNet", "Video ResNet"}
_RESIDUAL = {*_TORCHVISION_RESIDUAL, *_TIMM_RESIDUAL, *_OWN_RESIDUAL}
# Those that are made for other images than of 224×224 pixels.
_LARGER, _SMALL = (299, 299), (32, 32)
_SIZES = {"timm/inception_resnet_v2": _LARGER, "timm/inception_v4": _LARGER}
_CLIP = 16, 112, 112

# Without the heads that only training calls, and without weights from a truncated normal distribution, which take minutes.
_INCEPTION = {"aux_logits": False, "init_weights": False}


def _torchvision(name: str, **arguments: object) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **arguments)

    return create


def _timm(name: str) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return create


def _listed(source: str, maker: Callable[[str], Callable[[], nn.Module]], *families: dict[str, str]) -> list[Entry]:
    names = [(name, family) for some in families for family, listed in some.items() for name in listed.split()]
    return [Entry(f"{source}/{n}", family, maker(n), _SIZES.get(f"{source}/{n}", (224, 224))) for n, family in names]


def _pyramid(frozen: bool) -> nn.Module:
    """A ResNet-50 with a feature pyramid. Detectors freeze its batch norms."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d)
    if not frozen:
        return model
    settle(model, (224, 224))  # frozen ones take no statistics by themselves
    detectors = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    detectors.load_state_dict(model.state_dict())
    return detectors


class _CifarBlock(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if inside != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _CifarResNet(nn.Module):
    """A ResNet for images of 32×32 pixels, of 6 · blocks + 2 layers (He et al., 2015, section 4.2; projected shortcuts)."""

    def __init__(self, blocks: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inside, stages = 16, []
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(_CifarBlock(inside, width, 2 if stage and not block else 1))
                inside = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inside, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class _EcgBlock(nn.Module):
    def __init__(self, inside: int, width: int, stride: int, kernel: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inside, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, kernel, padding=kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.shortcut = nn.Sequential()
        if inside != width:
            self.shortcut = nn.Sequential(nn.Conv1d(inside, width, 1, stride, bias=False), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _EcgResNet(nn.Module):
    """A ResNet-18 of one dimension for electrocardiograms of 12 leads (Wang et al., 2017; Strodthoff et al., 2021)."""

    def __init__(self, leads: int = 12, classes: int = 6, widths: tuple[int, ...] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(leads, 64, 15, 2, 7, bias=False)
        self.bn1, self.relu, self.pool = nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.MaxPool1d(3, 2, 1)
        pairs = zip((64, *widths), widths, strict=False)
        blocks = [(_EcgBlock(a, b, 1 if a == b else 2), _EcgBlock(b, b, 1)) for a, b in pairs]
        self.blocks = nn.Sequential(*(block for pair in blocks for block in pair))
        self.average, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.average(x).flatten(1))


def _twice(inside: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class _UNet(nn.Module):
    """A small U-Net with batch norms (Ronneberger et al., 2015)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), classes: int = 21) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = [*zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(_twice(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, stage in enumerate(self.down):
            x = stage(self.pool(x) if i else x)
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat((skip, up(x)), 1))
        return self.head(x)


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_listed("torchvision", _torchvision, _TORCHVISION_RESIDUAL, _TORCHVISION_OTHERS),
        Entry("torchvision/googlenet", "Inception", _torchvision("googlenet", **_INCEPTION)),
        Entry("torchvision/inception_v3", "Inception", _torchvision("inception_v3", **_INCEPTION), _LARGER),
        Entry("torchvision/fcn_resnet50", "Segmentation ResNet", _torchvision("fcn_resnet50", weights_backbone=None)),
        Entry(
            "torchvision/deeplabv3_resnet50", "Segmentation ResNet", _torchvision("deeplabv3_resnet50", weights_backbone=None)
        ),
        Entry("torchvision/resnet50_fpn", "ResNet-FPN", lambda: _pyramid(frozen=False)),
        Entry("torchvision/resnet50_fpn_frozen", "ResNet-FPN", lambda: _pyramid(frozen=True)),
        *_listed("timm", _timm, _TIMM_RESIDUAL, _TIMM_OTHERS),
        Entry("own/cifar_resnet20", "CIFAR-ResNet", lambda: _CifarResNet(3), _SMALL),
        Entry("own/cifar_resnet56", "CIFAR-ResNet", lambda: _CifarResNet(9), _SMALL),
        Entry("own/cifar_wide_resnet20", "CIFAR-ResNet", lambda: _CifarResNet(3, (64, 128, 256)), _SMALL),
        Entry("own/unet", "U-Net", _UNet),
        Entry("own/ecg_resnet18", "1-d ResNet", _EcgResNet, (4096,), 12),
        *(Entry(f"torchvision/{n}", "Video ResNet", _torchvision(n), _CLIP) for n in ("r3d_18", "mc3_18", "r2plus1d_18")),
    )
}


def chosen(patterns: str | None) -> list[Entry]:
    """The entries of these names, families or patterns such as "*resnet50*", separated by commas; None for all.

    Raises:
        UserError: a pattern fits nothing.
    """
    if patterns is None:
        return [*ENTRIES.values()]
    found: dict[str, Entry] = {}
    for pattern in [part.strip().lower() for part in patterns.split(",")]:
        own = {name: entry for name, entry in ENTRIES.items() if _fits(entry, pattern)}
        if not own:
            families = ", ".join(sorted({entry.family for entry in ENTRIES.values()}))
            raise UserError(
                f"--models has {pattern!r}, which fits no model of the zoo; it takes names such as resnet50 or timm/resnet50d, "
                f"patterns such as '*regnet*', and families, separated by commas: {families}"
            )
        found |= own
    return [entry for name, entry in ENTRIES.items() if name in found]


def _fits(entry: Entry, pattern: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (entry.name, entry.name.split("/")[1], entry.family.lower()))


def missing(entries: list[Entry]) -> list[str]:
    """The packages that these entries need and that are not installed."""
    return sorted(package for package in {entry.package for entry in entries} if importlib.util.find_spec(package) is None)
