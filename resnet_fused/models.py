"""ResNets made of the library's blocks, and conversion of other projects' checkpoints.

The models have torchvision's structure, attribute names and state-dict keys: its checkpoints load as they are, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion.batch_norm import bn_relu
from resnet_fused.modules.blocks import Block
from resnet_fused.modules.drop_ins import BasicBlock, Bottleneck
from resnet_fused.runtime.folding import hooks_of

__all__ = [
    "ResNet",
    "convert_state_dict",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class ResNet(nn.Module):
    """A residual network: stem, four stages of blocks, global average pool, classifier.

    Args:
        block: rf.BasicBlock or rf.Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        groups, width_per_group: of the blocks (ResNeXt, Wide-ResNet).
        replace_stride_with_dilation: for each of the last three stages, whether it dilates instead of striding.
        norm_layer: makes the batch norms; nn.BatchNorm2d by default.
        pool_padding: pixels of padding of the stem's max-pool: 1 as torchvision, 0 for models whose pool has none.
        zero_init_residual: whether the last batch norm of each block begins with a weight of 0, and the block as its shortcut
            (Goyal et al., Accurate, Large Minibatch SGD, 2017, section 5.1).

    Shapes: x (N, in_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: num_classes or in_channels is no positive integer, or there aren't four stages; or, of rf.BasicBlock,
            groups, width_per_group or dilation is other than 1, 64 and 1.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015; torchvision's variant (V1.5) has the stride of a
    bottleneck at its 3×3 convolution.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: tuple[bool, bool, bool] = (False, False, False),
        norm_layer: Callable[[int], nn.Module] | None = None,
        pool_padding: int = 1,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer.")
        if len(layers) != 4 or len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"layers is {layers!r} and replace_stride_with_dilation {replace_stride_with_dilation!r}; they must have 4 and "
                "3 elements, one for each stage, the first of which never dilates."
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=pool_padding)
        self.layer1 = self._stage(block, 64, layers[0], 1, False)
        self.layer2 = self._stage(block, 128, layers[1], 2, replace_stride_with_dilation[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, replace_stride_with_dilation[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, Block):
                weight = getattr(module.main_path()[-1][1], "weight", None)
                if weight is not None:
                    nn.init.zeros_(weight)

    def _stage(self, block: Any, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        modules = []
        for i in range(blocks):
            modules.append(
                block(
                    self.inplanes,
                    planes,
                    stride if i == 0 else 1,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=first_dilation if i == 0 else self.dilation,
                    norm_layer=self._norm_layer,
                )
            )
            self.inplanes = planes * block.expansion
        return nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        # In inference by its own modules, where rf.fuse finds them and makes one op of them.
        fused = self.training and type(self.relu) is nn.ReLU and hooks_of(self.relu) is None
        x = self.maxpool(bn_relu(self.bn1, x) if fused else self.relu(self.bn1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-18. Further arguments as `ResNet`."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes, in_channels, **kwargs)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-34. Further arguments as `ResNet`."""
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes, in_channels, **kwargs)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-50. Further arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, in_channels, **kwargs)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-101. Further arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, in_channels, **kwargs)


def resnet152(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-152. Further arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 8, 36, 3], num_classes, in_channels, **kwargs)


def resnext50_32x4d(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNeXt-50 with 32 groups of 4 channels. Further arguments as `ResNet`. Source: Xie et al., 2017."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, in_channels, **{"groups": 32, "width_per_group": 4, **kwargs})


def resnext101_32x8d(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """ResNeXt-101 with 32 groups of 8 channels. Further arguments as `ResNet`. Source: Xie et al., 2017."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, in_channels, **{"groups": 32, "width_per_group": 8, **kwargs})


def wide_resnet50_2(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """Wide ResNet-50, twice as wide inside. Further arguments as `ResNet`. Source: Zagoruyko and Komodakis, 2016."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, in_channels, **{"width_per_group": 128, **kwargs})


def wide_resnet101_2(num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ResNet:
    """Wide ResNet-101, twice as wide inside. Further arguments as `ResNet`. Source: Zagoruyko and Komodakis, 2016."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, in_channels, **{"width_per_group": 128, **kwargs})


# Place in a block's Sequential "convlayers" → attribute, for two and for three convolutions.
_CONVLAYERS = {
    5: {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2"},
    8: {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"},
}
# Place in the model's Sequential "stacklayers" → attribute.
_STACKLAYERS = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4", 10: "fc"}


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the state dict of a plain ResNet that keeps its layers in Sequentials to the keys of this module's models.

    Such models have the network in `stacklayers` (convolution, batch norm, ReLU, max-pool, four stages, pool, flatten, linear)
    and each block in `convlayers` (convolution, batch norm, ReLU, …) and `downsample`. Their max-pool has no padding: make the
    model with `pool_padding=0`. State dicts that have torchvision's keys already are returned unchanged. A model of them that
    adds a projection wherever channels change, and only there, has the same parameters; its first bottleneck stage does too.

    Args:
        state_dict: as model.state_dict() gives it.

    Returns:
        A new dict of the same tensors under torchvision's names.

    Raises:
        ValueError: a key fits neither form; the message names it.
    """
    if not any(key.startswith("stacklayers.") for key in state_dict):
        unknown = [k for k in state_dict if k.split(".")[0] not in (*_STACKLAYERS.values(),)]
        if unknown:
            raise ValueError(
                f"state_dict has the key {unknown[0]!r}; known are torchvision's (conv1.weight, layer1.0.conv1.weight, …) and "
                "those of models that keep everything in 'stacklayers'. Rename the keys to torchvision's."
            )
        return dict(state_dict)
    last: dict[str, int] = {}
    for key in state_dict:
        block, found, rest = key.partition(".convlayers.")
        if found:
            last[block] = max(last.get(block, 0), int(rest.split(".")[0]))
    return {_convert_key(key, last): tensor for key, tensor in state_dict.items()}


def _convert_key(key: str, last: dict[str, int]) -> str:
    try:
        _, place, rest = key.split(".", 2)
        new = f"{_STACKLAYERS[int(place)]}.{rest}"
        block, found, inner = key.partition(".convlayers.")
        if found:
            index, name = inner.split(".", 1)
            head = new.partition(".convlayers.")[0]
            new = f"{head}.{_CONVLAYERS[last[block] + 1][int(index)]}.{name}"
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"state_dict has the key {key!r}, which fits no ResNet that keeps its layers in 'stacklayers' and 'convlayers'. "
            "Rename the keys to torchvision's (conv1.weight, layer1.0.conv1.weight, …)."
        ) from error
    return new
