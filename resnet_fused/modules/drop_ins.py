"""rf.BasicBlock and rf.Bottleneck: torchvision's constructors and attributes, and its classes as bases where it is installed.

torchvision asks for its own classes: `zero_init_residual` reaches nothing else. Nothing of theirs is called. This module is
imported when a block is first asked for, since it imports torchvision, which takes as long as PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resnet_fused.modules.blocks import Block

NormLayer = Callable[[int], nn.Module]


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def _torchvisions(name: str) -> tuple[type[nn.Module], ...]:
    """torchvision's block of that name; nothing where torchvision can't be imported, whatever the reason."""
    try:
        from torchvision.models import resnet

        return (getattr(resnet, name),)
    except Exception:
        return ()


class BasicBlock(Block, *_torchvisions("BasicBlock")):  # type: ignore[misc]
    """Residual block of two 3×3 convolutions, a drop-in for torchvision.models.resnet.BasicBlock.

        y = relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))

    Args:
        inplanes: input channels.
        planes: output channels.
        stride: of the first convolution and the shortcut.
        downsample: Sequential(convolution, batch norm) for the shortcut. Without one, the block makes its own where stride or
            channels make it necessary.
        groups, base_width, dilation: 1, 64 and 1; the block has no other form.
        norm_layer: makes the batch norms; nn.BatchNorm2d by default.
        memory_efficient: whether training computes the results of inner batch norms and ReLUs again in backward, not keeping
            them; an attribute too, which may be set at any time.

    Shapes: x (N, inplanes, H, W) to y (N, planes, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: groups, base_width or dilation other than 1, 64 and 1.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5, left.
    """

    op = "basic_block"
    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        memory_efficient: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.memory_efficient = memory_efficient
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError(
                f"groups={groups}, base_width={base_width}, dilation={dilation}: BasicBlock has only groups=1, base_width=64 "
                "and dilation=1. Use Bottleneck for grouped, wide or dilated blocks."
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self._path = None
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample or _projection(inplanes, planes, stride, norm_layer)
        self.stride = stride

    def main_path(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(Block, *_torchvisions("Bottleneck")):  # type: ignore[misc]
    """Residual block of a 1×1, a 3×3 and a 1×1 convolution, a drop-in for torchvision.models.resnet.Bottleneck.

        y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))

    Args:
        inplanes: input channels.
        planes: a quarter of the output channels.
        stride: of the 3×3 convolution (ResNet V1.5) and the shortcut.
        downsample: Sequential(convolution, batch norm) for the shortcut. Without one, the block makes its own where stride or
            channels make it necessary.
        groups: of the 3×3 convolution (ResNeXt).
        base_width: channels of the 3×3 convolution for each 64 planes and group (ResNeXt, Wide-ResNet).
        dilation: of the 3×3 convolution.
        norm_layer: makes the batch norms; nn.BatchNorm2d by default.
        memory_efficient: whether training computes the results of inner batch norms and ReLUs again in backward, not keeping
            them; an attribute too, which may be set at any time.

    Shapes: x (N, inplanes, H, W) to y (N, 4·planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5, right.
    """

    op = "bottleneck"
    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        memory_efficient: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.memory_efficient = memory_efficient
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        outplanes = planes * self.expansion
        self._path = None
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, outplanes)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample or _projection(inplanes, outplanes, stride, norm_layer)
        self.stride = stride

    def main_path(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


def _projection(inplanes: int, outplanes: int, stride: int, norm_layer: NormLayer) -> nn.Module | None:
    """The shortcut where the identity doesn't fit: a 1×1 convolution and a batch norm."""
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(_conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))
