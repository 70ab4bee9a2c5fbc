"""Convolutions of several groups by the compiled operators, on each instruction set, against float64 and stock PyTorch."""

from __future__ import annotations

import pytest
import torch
from support.cpu_layers import Layer
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock

from resnet_fused.backends import NO_PARAMETERS, Activation, Conv, ConvParameters, Epilogue, get
from resnet_fused.backends.cpu.chain import Chain
from resnet_fused.backends.cpu.packing import padded_bias
from resnet_fused.backends.processor import processor

BF16, F16 = torch.bfloat16, torch.float16

RELU = Epilogue(activation=Activation.RELU)


def depthwise(channels: int, **more) -> dict:
    return {"n": 2, "c": channels, "h": 9, "w": 11, "out": channels, "groups": channels, **more}


def groups(count: int, inside: int, outside: int | None = None, **more) -> dict:
    return {"n": 2, "c": count * inside, "h": 9, "w": 11, "out": count * (outside or inside), "groups": count, **more}


LAYERS = {
    "depthwise": depthwise(32),
    "depthwise, stride 2": depthwise(32, stride=2),
    "depthwise, 5x5": depthwise(48, kernel=5, padding=2),
    "depthwise, 5x5, stride 2": depthwise(16, kernel=5, padding=2, stride=2, h=14, w=17),
    "depthwise, 7x7": depthwise(20, kernel=7, padding=3),
    "depthwise, 7x7, stride 2": depthwise(16, kernel=7, padding=3, stride=2),
    "depthwise, 5 channels": depthwise(5),
    "depthwise, 20 channels, no residual, no ReLU": depthwise(20, residual=False, relu=False),
    "depthwise, 100 channels, whole tiles and edges": depthwise(100, h=20, w=37),
    "depthwise, one column": depthwise(33, w=1),
    "depthwise, one row": depthwise(33, h=1, kernel=5, padding=2),
    "depthwise, one pixel": depthwise(17, h=1, w=1),
    "depthwise, no padding": depthwise(16, padding=0),
    "depthwise, padding beyond the filter": depthwise(16, padding=5),
    "depthwise, stride 2 beyond the image": depthwise(16, padding=4, stride=2, h=1, w=2),
    "depthwise, image by image": depthwise(16, n=20, h=3, w=4),
    "depthwise, in parts of lines": depthwise(32, n=1, h=61, w=15),
    "depthwise, x and y fetched ahead": depthwise(96, n=1, h=110, w=112),
    "depthwise, bfloat16": depthwise(36, dtype=BF16),
    "depthwise, 5x5, bfloat16, stride 2": depthwise(16, kernel=5, padding=2, stride=2, w=30, dtype=BF16),
    "4 channels a group": groups(8, 4),
    "4 channels a group, stride 2": groups(8, 4, stride=2, w=30),
    "8 channels a group": groups(5, 8),
    "16 channels a group": groups(3, 16),
    "16 channels a group, stride 2": groups(3, 16, stride=2, w=30),
    "24 channels a group": groups(5, 24),
    "24 channels a group, stride 2": groups(2, 24, stride=2),
    "64 channels a group": groups(2, 64, w=17),
    "5 channels a group, 100 in all": groups(20, 5),
    "12 channels a group": groups(3, 12),
    "7 channels a group, no residual, no ReLU": groups(3, 7, residual=False, relu=False),
    "one input channel a group": groups(10, 1, 2),
    "one output channel a group": groups(10, 3, 1),
    "more inputs than a vector": groups(3, 20, 2),
    "more outputs than a vector": groups(3, 2, 20),
    "groups, one column": groups(4, 6, w=1),
    "groups, one pixel": groups(4, 4, h=1, w=1),
    "groups, no padding": groups(4, 8, padding=0),
    "weights beyond L2, channels copied": groups(10, 40, n=1, w=8),
    "weights beyond L2, stride 2": groups(8, 48, n=3, h=14, w=14, stride=2),
    "weights beyond L2, copied in parts": groups(6, 64, n=1, h=40, w=33),
    "weights beyond L2, small groups": groups(470, 4, n=1, h=3, w=8),
    "4 channels a group, bfloat16": groups(8, 4, dtype=BF16),
    "depthwise, 5x5, float16, stride 2": depthwise(36, kernel=5, padding=2, stride=2, w=30, dtype=F16),
    "4 channels a group, float16": groups(8, 4, dtype=F16),
    "24 channels a group, float16": groups(3, 24, dtype=F16),
    "weights beyond L2, float16": groups(10, 40, n=1, w=8, dtype=F16),
    "24 channels a group, bfloat16, stride 2": groups(3, 24, stride=2, dtype=BF16),
    "weights beyond L2, bfloat16": groups(10, 40, n=1, w=8, dtype=BF16),
}


@pytest.mark.parametrize("sizes", LAYERS.values(), ids=[*LAYERS])
def test_as_good_as_stock(isa: str, sizes: dict):
    layer = Layer(**sizes)
    y = layer.ours([])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_good_as_stock(y, layer.stock(layer.dtype), layer.stock(torch.float64))


@pytest.mark.parametrize("sizes", [depthwise(20), groups(5, 4), groups(2, 24)], ids=["depthwise", "small", "wide"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_stay_where_they_are_in_stock(isa: str, sizes: dict, special: float):
    layer = Layer(**sizes)
    layer.x[0, 3, 5, 5] = special
    layer.x[1, 7, 0, 0] = special
    assert layer.added is not None
    layer.added[0, 0, 0, 0] = -torch.tensor(float("nan"))
    y, stock = layer.ours([]), layer.stock(torch.float32)
    assert torch.equal(y.isnan(), stock.isnan())
    assert torch.equal(y.isinf(), stock.isinf())
    assert_as_good_as_stock(y, stock, layer.stock(torch.float64))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads: int):
    before = torch.get_num_threads()
    layers = [Layer(**depthwise(40, h=33)), Layer(**groups(5, 24)), Layer(**groups(10, 40, n=1))]
    want = [layer.ours([]) for layer in layers]
    try:
        torch.set_num_threads(threads)
        for layer, expected in zip(layers, want, strict=True):
            assert torch.equal(layer.ours([]), expected)
    finally:
        torch.set_num_threads(before)


def test_weights_in_any_memory_format_are_packed(isa: str):
    conv = Conv(32, 32, (3, 3), padding=(1, 1), groups=8)
    kind = problem_of("conv2d_bn", (1, 32, 6, 6), torch.float32, torch.device("cpu"), (conv,))
    weight, bias, x = torch.randn(32, 4, 3, 3), torch.randn(32), torch.randn(1, 32, 6, 6)
    results = [
        get("cpu").prepare(kind, ConvParameters((w,), (bias,)))(x, None)
        for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT)
    ]
    assert all(torch.equal(y, results[0]) for y in results)


GEOMETRY = [3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("count", "geometry", "plan", "message"),
    [
        pytest.param(5, GEOMETRY, [], "groups is 5; it must divide the 16", id="no-divisor"),
        pytest.param(0, GEOMETRY, [], "groups is 0", id="zero"),
        pytest.param(2, GEOMETRY, [], "packed weights of this problem", id="weights-of-others"),
        pytest.param(4, GEOMETRY, [4, 8, 4, 64, 0], "plan must be empty", id="winograd"),
        pytest.param(4, [3, 3, 1, 2, 1, 1, 1, 1], [], "one stride of 1 or 2", id="uneven-stride"),
        pytest.param(4, [3, 3, 3, 3, 1, 1, 1, 1], [], "one stride of 1 or 2", id="stride-3"),
        pytest.param(4, [3, 3, 1, 1, 1, 1, 2, 2], [], "no dilation", id="dilation"),
    ],
)
def test_wrong_arguments_are_named(count: int, geometry: list[int], plan: list[int], message: str):
    weight = torch.randn(16, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.resnet_fused_cpu.pack_grouped(weight, 4)
    chain = Chain([(1, 16, 8, 8)], torch.float32)
    with pytest.raises(ValueError, match=message):
        chain.conv(0, None, packed, padded_bias(torch.zeros(16)), 16, count, geometry, RELU, NO_PARAMETERS, plan)


def test_a_kernel_of_another_size_is_refused():
    weight = torch.randn(16, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.resnet_fused_cpu.pack_grouped(weight, 4)
    chain = Chain([(1, 16, 8, 8)], torch.float32)
    with pytest.raises(ValueError, match="5 x 5; it must be 3 x 3"):
        chain.conv(0, None, packed, padded_bias(torch.zeros(16)), 16, 4, [5, 5, 1, 1, 2, 2, 1, 1], RELU, NO_PARAMETERS, [])
    with pytest.raises(ValueError, match="groups is 3; it must divide"):
        torch.ops.resnet_fused_cpu.pack_grouped(weight, 3)
    with pytest.raises(ValueError, match="weight is empty"):
        torch.ops.resnet_fused_cpu.pack_grouped(weight[:0], 1)


def _square(channels: int, count: int, stride: int = 1, size: int = 3) -> Conv:
    return Conv(channels, channels, (size, size), (stride, stride), (size // 2, size // 2), groups=count)


F32 = torch.float32


@pytest.mark.parametrize(
    ("conv", "dtype", "by"),
    [
        pytest.param(_square(96, 96), F32, {"avx2", "avx512"}, id="depthwise"),
        pytest.param(_square(96, 96, 2, 5), BF16, {"avx512"}, id="depthwise-bfloat16"),
        pytest.param(_square(128, 32), F32, {"avx2", "avx512"}, id="narrow-groups"),
        pytest.param(_square(128, 32), BF16, {"avx512"}, id="narrow-groups-bfloat16"),
        pytest.param(_square(512, 32), F32, {"avx512"}, id="wide-groups"),
        pytest.param(_square(512, 32), BF16, set(), id="wide-groups-bfloat16"),
        pytest.param(_square(512, 32), F16, {"avx2", "avx512"}, id="wide-groups-float16"),
        pytest.param(_square(1024, 32, 2), F32, set(), id="wide-groups-stride-2"),
        pytest.param(Conv(32, 64, (3, 3), padding=(1, 1), groups=8), F32, set(), id="more-outputs-than-inputs"),
    ],
)
@pytest.mark.parametrize("precision", ["fast", "direct"])
def test_it_is_preferred_where_it_was_measured_to_be_faster(isa: str, conv: Conv, dtype, by: set[str], precision: str):
    if dtype == BF16 and torch.ops.resnet_fused_cpu.amx_bf16():
        pytest.skip("this CPU has AMX, by which oneDNN is preferred; run the tests on a CPU without it")
    if dtype == F16 and processor().multiplies("float16"):
        pytest.skip("this CPU multiplies float16, and stock comes first; run the tests on a CPU that doesn't")
    if isa == "scalar":
        pytest.skip("scalar kernels are preferred for nothing; run the tests on a CPU with AVX2 or AVX-512")
    kind = problem_of("conv2d_bn", (1, conv.in_channels, 28, 28), dtype, torch.device("cpu"), (conv,), precision=precision)
    # Without instructions for bfloat16 stock emulates it.
    emulated = dtype == BF16 and not torch.ops.resnet_fused_cpu.avx512_bf16()
    assert get("cpu").preferred(kind) == (isa in by or emulated)
