"""Results of the convolution kernels, executed from their PTX, against float64; every kernel, every path, and their edges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.emulated_cuda import A100, T4, conv2d
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CHANNELS = {"f16": F16, "bf16": BF16, "tf32": F32, "f32": F32}


@dataclass(frozen=True)
class Case:
    """A convolution of k×kernel filters on x of `shape`; `options` go to emulate.conv2d.

    `path` is what the kernel's name must have in it: "stem", "gather" (x loaded by element) or neither.
    """

    shape: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    dtype: torch.dtype = F16
    residual: bool = True
    relu: bool = True
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        c = self.shape[1]
        weight = torch.randn(self.k, c, *self.kernel) / (c * self.kernel[0] * self.kernel[1]) ** 0.5
        x, weight = torch.randn(self.shape).to(self.dtype), weight.to(self.dtype)
        residual = torch.randn_like(self.stock(x, weight)) if self.residual else None
        return x, weight, torch.randn(self.k).to(self.dtype), residual

    def stock(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Stock PyTorch's ops, one after the other, in the tensors' dtype."""
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        if residual is not None:
            y = y + residual
        return y.relu() if self.relu and bias is not None else y

    def run(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None):
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        activation = "relu" if self.relu else "none"
        return conv2d(x, weight, bias, residual, activation=activation, **geometry, **self.options)

    def check(self, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> list[str]:
        """Compares with float64, and gives the kernels that ran."""
        result = self.run(*tensors)
        x, weight, bias, residual = tensors
        if self.options.get("tf32"):
            stock = self.stock(to_tf32(x), to_tf32(weight), bias, residual)  # what tensor cores get of the inputs
        else:
            stock = self.stock(*tensors)
        truth = self.stock(*(None if t is None else t.double() for t in tensors))
        assert_as_good_as_stock(result.y, stock, truth)
        return result.kernels


def to_tf32(t: Tensor) -> Tensor:
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# Rows, channels and k that fill no tile, more than one block in both directions, and a filter row beyond the image.
TILES = ["128x256x32", "256x128x32", "128x128x64", "128x128x32", "256x64x32", "128x64x32", "64x64x64"]
KERNELS = [
    *(f"conv2d_fwd_{t}_{tile}" for t, tile in zip(("f16", "bf16") * 4, TILES, strict=False)),
    *(f"conv2d_fwd_tf32_{tile}" for tile in ("128x128x16", "128x64x16", "64x64x32")),
    *(f"conv2d_fwd_f32_{tile}" for tile in ("128x64x16", "64x64x16")),
    *(f"conv2d_fwd_f16_sm75_{tile}" for tile in ("128x128x32", "64x64x32")),
    "conv2d_fwd_f32_sm75_128x64x16",
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel: str) -> None:
    element = kernel.split("_")[2]
    block_m, block_n = map(int, kernel.split("_")[-1].split("x")[:2])
    # One block and a bit of pixels; of channels, a bit more than one block of the narrow tiles.
    width = block_m // 8 + 3
    options = {"kernel": kernel, "splits": 1, "tf32": element == "tf32", "device": T4 if "sm75" in kernel else A100}
    k = 72 if block_n == 64 else block_n - 40
    case = Case((1, 40, 9, width), k, dtype=CHANNELS[element], options=options)
    assert case.check(case.tensors()) == [kernel]


CASES = {
    "strided": Case((2, 64, 13, 7), 64, stride=(2, 2), dtype=BF16),
    "pointwise_as_a_product": Case((2, 64, 9, 7), 72, kernel=(1, 1), padding=(0, 0), residual=False),
    "pointwise_strided": Case((2, 32, 9, 7), 64, kernel=(1, 1), padding=(0, 0), stride=(2, 2), relu=False, residual=False),
    "dilated_uneven_geometry": Case((1, 16, 12, 11), 32, kernel=(3, 2), stride=(1, 2), padding=(2, 3), dilation=(3, 2)),
    "one_pixel": Case((1, 16, 1, 1), 32, kernel=(1, 1), padding=(0, 0)),
    "split_k": Case((1, 128, 5, 5), 64, options={"splits": 4}),
    "split_k_odd_channels": Case((1, 128, 5, 5), 50, dtype=BF16, options={"splits": 3}),
    "three_tiles_of_channels": Case(
        (1, 16, 9, 9), 136, kernel=(1, 1), padding=(0, 0), options={"kernel": "conv2d_fwd_f16_64x64x64", "splits": 1}
    ),
    "odd_output_channels": Case((1, 32, 5, 5), 31, options={"splits": 1}),
    "three_channels": Case((1, 3, 9, 10), 24, kernel=(5, 5), padding=(2, 2), path="gather"),
    "one_channel": Case((1, 1, 9, 10), 24, dtype=BF16, path="gather"),
    "odd_channels_dilated": Case((1, 5, 9, 11), 24, stride=(1, 2), padding=(0, 2), dilation=(1, 2), path="gather"),
    "odd_channels_float32": Case((1, 5, 9, 11), 23, dtype=F32, path="gather"),
    "odd_channels_tf32": Case((1, 5, 9, 11), 23, dtype=F32, options={"tf32": True}, path="gather"),
    "odd_channels_sm75": Case((1, 5, 9, 11), 24, options={"device": T4}, path="gather"),
    "odd_channels_float32_sm75": Case((1, 5, 9, 11), 24, dtype=F32, options={"device": T4}, path="gather"),
    "stem": Case((2, 3, 36, 40), 64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), path="stem"),
    "stem_partial_tiles": Case(
        (1, 3, 30, 24), 72, kernel=(7, 7), stride=(2, 2), padding=(3, 3), dtype=BF16, residual=False, path="stem"
    ),
    "stem_of_odd_width": Case((1, 3, 20, 21), 64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), residual=False, path="gather"),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    kernels = CASES[name].check(CASES[name].tensors())
    assert [path for path in ("stem", "gather") if path in kernels[0]] == ([CASES[name].path] if CASES[name].path else [])
    assert (len(kernels) == 2) == ("split_k" in name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((1, 40, 6, 7), 72, options={"splits": 1}), id="tensor_cores"),
        pytest.param(Case((1, 3, 24, 24), 64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)), id="stem"),
        pytest.param(Case((1, 3, 9, 9), 24), id="gather"),
        pytest.param(Case((1, 40, 6, 7), 24, dtype=F32), id="float32"),
        pytest.param(Case((1, 128, 5, 5), 64, options={"splits": 2}), id="split_k"),
        pytest.param(Case((1, 40, 6, 7), 24, options={"device": T4, "splits": 1}), id="sm75"),
    ],
)
def test_nan_and_infinity_stay_where_stock_has_them(case: Case) -> None:
    x, weight, bias, residual = case.tensors()
    assert residual is not None
    x[0, 0, 3, 2], x[0, -1, 0, 0], x[0, 0, -1, -1] = torch.inf, torch.nan, -torch.inf
    x[0, 0, 2, 4] = torch.inf  # just behind the window of a pixel of the stem, whose kernel loads it all the same
    residual[0, 0, 0, 1], residual[0, -1, -1, -1] = torch.nan, torch.inf
    case.check((x, weight, bias, residual))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((1, 64, 3, 3), 64, kernel=(1, 1), padding=(0, 0), options={"splits": 1}), id="vectors"),
        pytest.param(Case((1, 64, 3, 3), 31, kernel=(1, 1), padding=(0, 0), options={"splits": 1}), id="elements"),
        pytest.param(Case((1, 256, 3, 3), 64, kernel=(1, 1), padding=(0, 0), options={"splits": 2}), id="split_k"),
        pytest.param(Case((1, 256, 3, 3), 50, kernel=(1, 1), padding=(0, 0), options={"splits": 2}), id="split_k_elements"),
    ],
)
def test_a_sum_beyond_float16_is_infinite_as_in_stock(case: Case) -> None:
    """80,000 − 20,000 is within float16, but stock stores the convolution's result before it adds the residual."""
    x, weight, bias, residual = case.tensors()
    assert residual is not None
    x, weight, bias = x.fill_(8.0), weight.fill_(14_336 / (8 * case.shape[1])), bias.fill_(65_472.0)
    weight[0] *= -1
    weight[1, 0] = torch.nan
    bias[2] = 40_000.0
    residual.fill_(-20_000.0)
    stock = case.stock(x, weight, bias, residual)
    assert stock[0, 1].isnan().all()
    assert stock[0, [0, 2]].isfinite().all()
    assert stock[0, 3:].isinf().all()
    torch.testing.assert_close(case.run(x, weight, bias, residual).y, stock, equal_nan=True)
