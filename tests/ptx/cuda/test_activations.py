"""Every function in every epilogue of the CUDA kernels, executed from their PTX: values, NaN, infinities and zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import FUNCTIONS, SLOPE, check_function, epilogue_of, on_gpu, special_operands
from support.emulated_cuda import T4, Norm, conv2d
from torch import Tensor

from resnet_fused.backends import Activation

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
STEM = {"stride": (2, 2), "padding": (3, 3)}
# Shape of x, output channels, filter size, dtype, geometry and options: a family of kernels, or a path of its epilogue, each.
FAMILIES: dict[str, tuple[tuple[int, int, int, int], int, int, torch.dtype, dict[str, Any]]] = {
    "vectors": ((2, 16, 3, 5), 72, 1, F16, {"splits": 1}),
    "vectors-bf16": ((2, 16, 3, 5), 64, 1, BF16, {"splits": 1, "kernel": "conv2d_fwd_bf16_128x128x32"}),
    "elements": ((2, 16, 3, 5), 31, 1, F16, {"splits": 1}),
    "split-k": ((2, 128, 3, 5), 64, 1, F16, {"splits": 2}),
    "split-k-elements": ((2, 64, 3, 5), 30, 1, F32, {"splits": 2}),
    "stem": ((2, 3, 16, 16), 64, 7, BF16, STEM),
    "gather": ((2, 3, 5, 5), 24, 1, F16, {}),
    "float32": ((2, 16, 3, 5), 40, 1, F32, {}),
    "tf32": ((2, 16, 3, 5), 40, 1, F32, {"tf32": True}),
    "sm75": ((2, 16, 3, 5), 40, 1, F16, {"device": T4}),
}


def rounded_to_tf32(t: Tensor) -> Tensor:
    """To what is exact in TF32, so that stock's float32 is the yardstick."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.value)
@pytest.mark.parametrize("family", FAMILIES)
def test_convolution(family: str, function: Activation) -> None:
    shape, k, size, dtype, options = FAMILIES[family]
    x, weight = torch.randn(shape).to(dtype), (torch.randn(k, shape[1], size, size) / (shape[1] * size) ** 0.5).to(dtype)
    if options.get("tf32"):
        x, weight = rounded_to_tf32(x), rounded_to_tf32(weight)
    geometry = {key: options[key] for key in STEM if key in options}
    bias, residual = torch.randn(k).to(dtype), torch.randn(F.conv2d(x, weight, **geometry).shape).to(dtype)
    special_operands(x, bias, residual)
    epilogue = epilogue_of(function)
    y = conv2d(x, weight, bias, residual, activation=function.value, slope=epilogue.slope, **options).y
    sums = F.conv2d(x, weight, bias, **geometry) + residual
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **geometry) + residual.double()
    check_function(y, sums, exact, epilogue)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.value)
@pytest.mark.parametrize("k", [64, 31], ids=["vectors", "elements"])
def test_a_sum_beyond_float16_is_infinite_as_in_stock(k: int, function: Activation, residual: bool) -> None:
    """Stock stores the sums before it takes the function: of -70,000 in float16 SiLU is NaN, and a leaky ReLU infinite."""
    x, weight = torch.full((1, 64, 2, 3), 8.0).half(), torch.full((k, 64, 1, 1), 100.0).half()
    weight[::2] *= -1
    added = torch.full((1, k, 2, 3), -40_000.0).half() if residual else None
    epilogue = epilogue_of(function)
    y = conv2d(x, weight, torch.full((k,), 20_000.0), added, activation=function.value, slope=epilogue.slope, splits=1).y
    sums = F.conv2d(x, weight, torch.full((k,), 20_000.0).half())
    stock = on_gpu(sums if added is None else sums + added, epilogue)
    assert not on_gpu(torch.full((1,), -70_000.0), epilogue).isnan()
    torch.testing.assert_close(y, stock, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.value)
@pytest.mark.parametrize(("dtype", "channels"), [(F16, 16), (BF16, 13), (F32, 8)], ids=["vectors", "elements", "float32"])
def test_the_pass_after_cudnns_convolution(dtype: torch.dtype, channels: int, function: Activation) -> None:
    x, residual = torch.randn(2, 2, channels, 3, 5).to(dtype).unbind()
    bias, zeros, ones = torch.randn(channels), torch.zeros(channels), torch.ones(channels)
    x, residual = x.clone(), residual.clone()
    special_operands(x, bias, residual)
    epilogue = epilogue_of(function)
    y = Norm().activated(x, residual, zeros, ones, None, bias, 0.0, function.value, epilogue.slope)
    exact = x.double() + bias.double()[:, None, None] + residual.double()
    check_function(y, (x.float() + bias[:, None, None] + residual.float()).to(dtype), exact, epilogue)


def test_the_slope_is_the_launchs_own() -> None:
    x, weight, bias = torch.randn(1, 16, 3, 3).half(), torch.randn(8, 16, 1, 1).half(), torch.zeros(8)
    for slope in (SLOPE, 0.0, -2.0):
        y = conv2d(x, weight, bias, activation="leaky_relu", slope=slope).y
        torch.testing.assert_close(y, F.leaky_relu(F.conv2d(x, weight), slope))
