"""Plain residual blocks as users write them: layers in one Sequential, a shortcut that is a Sequential or a lambda."""

from __future__ import annotations

from torch import nn


def _layers(channels: list[int], kernels: list[int], strides: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
        layers += [
            nn.Conv2d(channels[i], channels[i + 1], kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels[i + 1]),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


class PlainBlock(nn.Module):
    """relu(downsample(x) + convlayers(x)), the shortcut before the main path."""

    def __init__(self, inside: int, out: int, stride: int, bottleneck: bool = False):
        super().__init__()
        self.downsample = lambda x: x
        if inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)
        if bottleneck:
            self.convlayers = _layers([inside, out // 4, out // 4, out], [1, 3, 1], [1, stride, 1])
        else:
            self.convlayers = _layers([inside, out, out], [3, 3], [stride, 1])

    def forward(self, x):
        out = self.downsample(x) + self.convlayers(x)
        return self.relu(out)


class PlainResNet(nn.Module):
    """A ResNet that keeps everything in `stacklayers`; its max-pool has no padding."""

    def __init__(self, bottleneck: bool = False, widths=(64, 128), classes: int = 10):
        super().__init__()
        blocks: list[nn.Module] = []
        inside = 64
        for i, width in enumerate(widths):
            out = width * (4 if bottleneck else 1)
            stride = 1 if i == 0 else 2
            blocks.append(nn.Sequential(PlainBlock(inside, out, stride, bottleneck), PlainBlock(out, out, 1, bottleneck)))
            inside = out
        self.stacklayers = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inside, classes),
        )

    def forward(self, x):
        return self.stacklayers(x)
