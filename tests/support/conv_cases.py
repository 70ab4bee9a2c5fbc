"""Problems of the convolution ops: each stands for something that could go wrong, named in its id."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem of a convolution op: shapes, geometry, dtype, and how the input lies in memory."""

    id: str
    x: tuple[int, int, int, int] = (2, 16, 9, 9)
    out_channels: int = 24
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    special: float | None = field(default=None)
    stock_fails: bool = False  # crashes, or adds up wrong numbers, in channels_last

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias."""
        n, c, h, w = self.x
        x = torch.randn(self.x)
        if self.special is not None:
            x[0, 0, h // 2, w // 2] = self.special
        x = x.to(self.dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.layout == "strided":
            x = torch.stack([x, x], dim=-1)[..., 0]
        elif self.layout == "expanded":
            x = x[:1].expand(n, c, h, w)
        elif self.layout == "flipped":
            x = x.flip(2)
        elif self.layout == "sliced":
            x = torch.cat([x, x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, c : 2 * c]
        elif self.layout == "numpy":
            array = x.permute(0, 2, 3, 1).cpu().numpy().copy()
            array.flags.writeable = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of memory that may not be written
                x = torch.from_numpy(array).permute(0, 3, 1, 2).to(x.device)
        elif self.layout == "unaligned":
            memory = torch.empty(1 + x.numel(), dtype=x.dtype)
            x = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
        weight = torch.randn(self.out_channels, c // self.groups, *self.kernel) / (c * self.kernel[0]) ** 0.5
        return x, weight.to(self.dtype), torch.randn(self.out_channels).to(self.dtype)


BF16 = torch.bfloat16
CASES = [
    Case("3x3"),
    Case("3x3-bfloat16", dtype=BF16),
    Case("3x3-float16", dtype=torch.float16),
    Case("1x1-float16-odd-channels", x=(2, 13, 7, 5), out_channels=11, kernel=(1, 1), padding=(0, 0), dtype=torch.float16),
    Case("float64-runs-on-stock", dtype=torch.float64),
    Case("contiguous-input", layout="contiguous"),
    Case("contiguous-input-bfloat16", layout="contiguous", dtype=BF16),
    Case("non-contiguous-input", layout="strided"),
    Case("expanded-input", layout="expanded"),
    Case("batch-0", x=(0, 16, 9, 9)),
    Case("batch-1", x=(1, 16, 9, 9)),
    Case("one-pixel", x=(2, 16, 1, 1)),
    Case("one-row", x=(2, 16, 1, 13)),
    Case("odd-channels", x=(2, 13, 7, 5), out_channels=11),
    Case("odd-channels-bfloat16", x=(2, 13, 7, 5), out_channels=11, dtype=BF16),
    Case("one-input-channel", x=(2, 1, 9, 9), out_channels=8),
    Case("one-output-channel", out_channels=1),
    Case("stem-7x7-stride-2", x=(2, 3, 33, 31), out_channels=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case("stem-bfloat16", x=(2, 3, 32, 32), out_channels=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), dtype=BF16),
    Case("1x1", x=(2, 64, 7, 7), out_channels=32, kernel=(1, 1), padding=(0, 0)),
    Case("1x1-stride-2", x=(2, 64, 7, 7), out_channels=128, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case("1x1-bfloat16", x=(2, 64, 7, 7), out_channels=256, kernel=(1, 1), padding=(0, 0), dtype=BF16),
    Case("1x1-with-padding", x=(2, 16, 7, 7), kernel=(1, 1), padding=(1, 1)),
    Case("3x3-stride-2", x=(2, 64, 15, 15), out_channels=64, stride=(2, 2)),
    Case("3x3-no-padding", padding=(0, 0)),
    Case("winograd-sized", x=(2, 64, 28, 28), out_channels=64),
    Case("winograd-sized-bfloat16", x=(2, 64, 28, 28), out_channels=64, dtype=BF16),
    Case("winograd-ragged-edges", x=(1, 32, 30, 17), out_channels=96),
    Case("dilation-2", dilation=(2, 2), padding=(2, 2)),
    Case("uneven-geometry", kernel=(3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    Case("dilated-1x1", x=(2, 16, 5, 1), out_channels=16, kernel=(1, 1), stride=(2, 2), dilation=(2, 2), stock_fails=True),
    Case("dilation-steps-over-a-column", x=(2, 16, 8, 1), stride=(1, 2), padding=(5, 5), dilation=(2, 2), stock_fails=True),
    Case(
        "dilation-steps-over-columns",
        x=(1, 2, 8, 2),
        kernel=(5, 3),
        stride=(1, 3),
        padding=(3, 7),
        dilation=(3, 3),
        stock_fails=True,
    ),
    Case("stride-of-columns-to-one", x=(1, 1, 5, 3), stride=(1, 2), padding=(2, 0), stock_fails=True),
    Case(
        "stride-of-columns-to-one-bfloat16",
        x=(1, 3, 4, 2),
        kernel=(5, 5),
        stride=(1, 3),
        padding=(2, 2),
        groups=3,
        dtype=BF16,
        stock_fails=True,
    ),
    Case("stride-beyond-the-image", x=(2, 16, 5, 4), stride=(9, 9)),
    Case("padding-beyond-the-filter", x=(2, 16, 5, 4), padding=(5, 7)),
    Case("window-larger-than-the-image", x=(2, 16, 2, 1), kernel=(5, 5), padding=(2, 2)),
    Case("one-output-channel-bfloat16", out_channels=1, dtype=BF16),
    Case("one-pixel-bfloat16", x=(2, 16, 1, 1), dtype=BF16),
    Case("one-pixel-1x1-bfloat16", x=(1, 16, 1, 1), kernel=(1, 1), padding=(0, 0), dtype=BF16),
    Case("groups-of-one-channel", x=(2, 8, 7, 5), out_channels=16, groups=8),
    Case("flipped-input", layout="flipped"),
    Case("channels-of-a-larger-input", layout="sliced"),
    Case("channels-of-a-larger-input-bfloat16", layout="sliced", dtype=BF16),
    Case("read-only-numpy-input", layout="numpy"),
    Case("input-at-an-odd-address", layout="unaligned"),
    Case("groups-4", groups=4),
    Case("groups-bfloat16", x=(2, 64, 7, 7), out_channels=64, groups=32, dtype=BF16),
    Case("depthwise-bfloat16", out_channels=16, groups=16, dtype=BF16),
    Case("depthwise", out_channels=16, groups=16),
    Case("depthwise-5x5-stride-2", x=(2, 20, 9, 8), out_channels=20, kernel=(5, 5), stride=(2, 2), padding=(2, 2), groups=20),
    Case("depthwise-7x7", x=(1, 33, 9, 12), out_channels=33, kernel=(7, 7), padding=(3, 3), groups=33),
    Case("depthwise-contiguous", out_channels=16, groups=16, layout="contiguous"),
    Case("depthwise-one-column", x=(2, 16, 9, 1), out_channels=16, stride=(2, 2), groups=16),
    Case("depthwise-stride-3", out_channels=16, stride=(3, 3), groups=16),
    Case("depthwise-uneven", out_channels=16, kernel=(3, 5), padding=(1, 2), groups=16),
    Case("groups-wide-stride-2", x=(1, 48, 9, 10), out_channels=48, stride=(2, 2), groups=2),
    Case("groups-5x5", kernel=(5, 5), padding=(2, 2), groups=4),
    Case("groups-dilated", padding=(2, 2), dilation=(2, 2), groups=4),
    Case("nan-input", special=float("nan")),
    Case("nan-input-bfloat16", special=float("nan"), dtype=BF16),
    Case("nan-in-depthwise", out_channels=16, groups=16, special=float("nan")),
    Case("inf-in-groups", out_channels=16, groups=4, special=float("inf")),
    Case("inf-input", special=float("inf")),
    Case("nan-in-1x1", x=(2, 64, 7, 7), kernel=(1, 1), padding=(0, 0), special=float("nan")),
    Case("nan-in-stem", x=(1, 3, 32, 32), out_channels=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), special=float("nan")),
]
