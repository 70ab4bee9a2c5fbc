"""Results of the whole blocks' kernels, executed from their PTX, against float64; every kernel, and the edges of its strips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.emulated_cuda import A100, H100, block
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused.backends import Conv, ConvParameters, Problem

F16, BF16 = torch.float16, torch.bfloat16
# One multiprocessor: an image is one strip.
SMALL_A100, SMALL_H100 = [80, 1, *A100[2:]], [90, 1, *H100[2:]]


@dataclass(frozen=True)
class Case:
    """A bottleneck of inner width 64 on images of `batch` × `height` × `width`."""

    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = F16
    projected: bool = False
    device: Sequence[int] = tuple(SMALL_A100)
    kernel: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 64 if self.projected else 256, self.height, self.width

    @property
    def problem(self) -> Problem:
        c = self.shape[1]
        convs = [Conv(c, 64, (1, 1)), Conv(64, 64, (3, 3), (1, 1), (1, 1)), Conv(64, 256, (1, 1))]
        convs += [Conv(c, 256, (1, 1))] if self.projected else []
        return problem_of("bottleneck", self.shape, self.dtype, torch.device("cpu"), convs, self.projected)

    def tensors(self) -> tuple[Tensor, ConvParameters]:
        shapes = [(conv.out_channels, conv.in_channels, *conv.kernel) for conv in self.problem.convs]
        weights = [torch.randn(shape) * (2 / (shape[1] * shape[2] ** 2)) ** 0.5 for shape in shapes]
        biases = [torch.randn(shape[0]) / 2 for shape in shapes]
        return torch.randn(self.shape).relu().to(self.dtype), ConvParameters(weights, biases).to(self.dtype)

    def run(self, x: Tensor, parameters: ConvParameters) -> Tensor:
        result = block(self.problem, x, parameters, self.device, self.kernel)
        assert self.kernel in ("", *result.kernels)
        return result.y

    def check(self, x: Tensor, parameters: ConvParameters) -> None:
        ours = self.run(x, parameters)
        assert_as_good_as_stock(ours, stock(x, parameters), stock(x.double(), parameters.to(torch.float64)))


def stock(x: Tensor, parameters: ConvParameters) -> Tensor:
    """Stock PyTorch's ops, one after the other, in the tensors' dtype."""
    (*shortcut, w1, w2, w3), (*bias, b1, b2, b3) = parameters.tensors()
    y = F.conv2d(F.conv2d(x, w1, b1).relu(), w2, b2, padding=1).relu()
    return (F.conv2d(y, w3, b3) + (F.conv2d(x, shortcut[0], bias[0]) if shortcut else x)).relu()


def kernel(name: str, dtype: torch.dtype) -> str:
    return f"bottleneck_fwd_{'f16' if dtype == F16 else 'bf16'}_{name}"


# Several steps of a strip, the last one with fewer rows than the others.
KERNELS = {
    "64": Case(9, 56, device=SMALL_A100),
    "64_resident": Case(10, 56, dtype=BF16, device=SMALL_H100),
    "64_projected": Case(7, 56, device=SMALL_A100, dtype=BF16, projected=True),
    "64_projected_resident": Case(13, 56, device=SMALL_H100, projected=True),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_kernel(name: str, dtype: torch.dtype) -> None:
    case = KERNELS[name]
    if case.dtype != dtype:  # at a smaller size
        case = Case(5, 30, dtype=dtype, projected=case.projected, device=case.device)
    case = Case(**{**vars(case), "kernel": kernel(name, dtype)})
    case.check(*case.tensors())


CASES = {
    "one_pixel": Case(1, 1, batch=3),
    "one_row": Case(1, 11, dtype=BF16),
    "one_column": Case(9, 1, projected=True),
    "an_image_in_one_step": Case(8, 8, batch=2),
    "strips_of_one_step": Case(9, 56, device=A100),
    "strips_of_two_steps": Case(19, 56, device=[80, 3, 163 << 10, 83 << 10]),
    "as_wide_as_two_rows_fill_the_warps": Case(5, 112, dtype=BF16),
    "residual_loaded_ahead": Case(9, 56, device=SMALL_H100, kernel="bottleneck_fwd_f16_64"),
    "pixels_that_fill_no_warp": Case(7, 13, batch=2, projected=True, device=A100),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    CASES[name].check(*CASES[name].tensors())


@pytest.mark.parametrize("projected", [False, True], ids=["identity", "projected"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_nan_and_infinity_stay_where_stock_has_them(projected: bool, dtype: torch.dtype) -> None:
    case = Case(6, 20, dtype=dtype, projected=projected)
    x, parameters = case.tensors()
    x[0, 0, 3, 2], x[0, -1, 0, 0], x[0, 5, -1, -1] = torch.inf, torch.nan, -torch.inf
    case.check(x, parameters)


@pytest.mark.parametrize("projected", [False, True], ids=["identity", "projected"])
def test_a_sum_beyond_float16_is_infinite_as_in_stock(projected: bool) -> None:
    """The main path or the shortcut alone is beyond float16, their sum is not: stock stores each before it adds them."""
    case = Case(3, 5, projected=projected)
    x, parameters = case.tensors()
    (weights, biases) = parameters.tensors()
    biases[-1][:8], biases[-1][8:16] = 65_500.0, -65_500.0
    weights[-1][:8] = weights[-1][:8].abs() * 20
    weights[-1][8:16] = -weights[-1][8:16].abs() * 20
    x[:, :16] = -1000.0
    if projected:
        biases[0][16:24], weights[0][16:24] = 65_500.0, weights[0][16:24].abs() * -4
        biases[-1][16:24] = -20_000.0
    expected = stock(x, parameters)
    assert 0 < expected.isinf().sum() < expected.numel() / 2
    ours = case.run(x, parameters)
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.equal(ours.isnan(), expected.isnan())


def test_a_row_of_zeros_lies_above_and_below_an_image_and_not_its_neighbours() -> None:
    case = Case(4, 8, batch=3)
    x, parameters = case.tensors()
    together = case.run(x, parameters)
    for i, image in enumerate(x):
        alone = Case(4, 8).run(image[None], parameters)
        assert torch.equal(together[i : i + 1], alone)
