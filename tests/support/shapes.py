"""The shapes of the benchmarks: layers of ResNet-18 and ResNet-50 at 224×224."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 8


@dataclass(frozen=True)
class Layer:
    """A convolution: input channels, output channels, filter, stride, and height and width of the input in pixels."""

    inside: int
    out: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.inside}-{self.out}-{self.kernel}x{self.kernel}-s{self.stride}-{self.size}px"


LAYERS = [
    Layer(64, 64, 3, 1, 56),
    Layer(128, 128, 3, 1, 28),
    Layer(256, 256, 3, 1, 14),
    Layer(512, 512, 3, 1, 7),
    Layer(128, 128, 3, 2, 56),
    Layer(256, 64, 1, 1, 56),
    Layer(64, 256, 1, 1, 56),
    Layer(1024, 256, 1, 1, 14),
    Layer(512, 2048, 1, 1, 7),
]

# Block and number of input channels, planes and pixels.
BLOCKS = [("BasicBlock", 64, 64, 56), ("BasicBlock", 256, 256, 14), ("Bottleneck", 256, 64, 56), ("Bottleneck", 1024, 256, 14)]

MODELS = [("resnet18", 1), ("resnet18", 8), ("resnet50", 1), ("resnet50", 8)]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Asserts that results agree within what their dtype allows."""
    tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
