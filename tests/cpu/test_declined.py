"""Values that Winograd can't be trusted with: the kernel declines, and the op gives stock's answer."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.cpu_layers import Block, Layer
from support.problems import problem_of
from support.tolerances import FLOOR
from torch import Tensor

import resnet_fused as rf
from resnet_fused.backends import NO_PARAMETERS, Activation, Conv, ConvParameters, Declined, Epilogue, get
from resnet_fused.backends.accuracy import ProblemCheck
from resnet_fused.backends.cpu import plan as cpu_plan
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.packing import padded_bias
from resnet_fused.tuning import candidates

CL = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUES = [1e10, 3.4e38, -1e5, math.inf, math.nan]

RELU = Epilogue(activation=Activation.RELU)


def pixels(n: int, h: int, w: int) -> list[tuple[int, int, int]]:
    """In the middle, in a corner, at an edge of the last image, and on both sides of where tiles of 4 meet."""
    return [(0, h // 2, w // 2), (0, 0, 0), (n - 1, h - 1, w // 3), (n - 1, h // 3, min(3, w - 1)), (0, min(4, h - 1), w - 1)]


@pytest.fixture
def declined(monkeypatch) -> list[str]:
    """Notes each problem of convolutions whose kernel declined and was replaced by stock's."""
    found: list[str] = []
    prepare = type(get("reference")).prepare

    def noted(self, problem, *rest):
        if problem.convs:
            found.append(problem.label)
        return prepare(self, problem, *rest)

    monkeypatch.setattr(type(get("reference")), "prepare", noted)
    return found


class Op(NamedTuple):
    """A convolution, or a stem with its pool, as rf.functional computes it."""

    n: int
    c: int
    h: int
    w: int
    out: int
    kernel: int = 3
    stride: int = 1
    pool: bool = False

    def parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(self[:4]).to(dtype).contiguous(memory_format=CL)
        weight = torch.randn(self.out, self.c, self.kernel, self.kernel) * (self.c * self.kernel**2) ** -0.5
        return x, weight.to(dtype), torch.randn(self.out).to(dtype)

    def stock(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, self.stride, self.kernel // 2).relu()
        return F.max_pool2d(y, 3, 2, 1) if self.pool else y

    def reached(self, n: int, h: int, w: int) -> Tensor:
        """Where the pixel has a share of the result."""
        x = torch.zeros(self.n, 1, self.h, self.w)
        x[n, 0, h, w] = 1
        return self.stock(x, torch.ones(1, 1, self.kernel, self.kernel), torch.zeros(1)) > 0

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with rf.use_backend("cpu"):
            if self.pool:
                return rf.functional.stem(x, weight, bias, self.stride, self.kernel // 2, 3, 2, 1)
            return rf.functional.conv2d_bn_relu(x, weight, bias, self.stride, self.kernel // 2)


OPS = {
    "3x3": Op(1, 64, 56, 56, 64),
    "3x3, channel tails, odd size": Op(3, 36, 15, 13, 40),
    "3x3, by panels": Op(2, 136, 14, 14, 136),
    "3x3, few tiles": Op(1, 136, 7, 7, 136),
    "3x3, stride 2": Op(4, 32, 56, 50, 32, stride=2),
    "stem": Op(2, 3, 40, 37, 64, 7, 2, pool=True),
    "stem without pool": Op(1, 3, 31, 40, 48, 7, 2),
}


def assert_unspoiled(y: Tensor, stock: Tensor, clean: Tensor, reached: Tensor) -> None:
    """Stock's NaN and Inf, and where the bad pixel doesn't reach, each value of the result `clean` that is without it.

    Args:
        reached: shape (N, 1, H, W).
    """
    assert torch.equal(y.isnan(), stock.isnan())
    assert torch.equal(y.isposinf(), stock.isposinf())
    assert torch.equal(y.isneginf(), stock.isneginf())
    error = (y.double() - clean).abs() / (1 + clean.abs())
    assert error[~reached.expand_as(y)].max() <= 10 * FLOOR[y.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=[*OPS])
def test_large_and_non_finite_pixels_spoil_nothing_that_they_do_not_reach(isa: str, op: Op, dtype: torch.dtype, declined):
    x, weight, bias = op.parameters(dtype)
    try:
        op.ours(x, weight, bias)
    except rf.BackendError:
        assert dtype == torch.bfloat16
        pytest.skip("without AVX512_BF16 this layer isn't served")
    assert not declined, "ordinary values were declined"
    clean = op.stock(x.double(), weight.double(), bias.double())
    places = pixels(op.n, op.h, op.w)
    for i, value in enumerate(VALUES):
        for place, channels in ((places[i], slice(None)), (places[i - 1], op.c // 2)):
            n, h, w = place
            bad = x.clone()
            bad[n, channels, h, w] = value
            assert_unspoiled(op.ours(bad, weight, bias), op.stock(bad, weight, bias), clean, op.reached(*place))
    # In bfloat16 some of these layers are summed directly, which declines nothing.
    assert declined or dtype == torch.bfloat16


# Plans: output tile, tiles together, panels together, channel chunk, by panels.
PLANS = {
    "by tiles": ({"n": 2, "c": 40, "h": 14, "w": 15, "out": 33}, [4, 8, 4, 64, 0]),
    "by panels": ({"n": 2, "c": 40, "h": 14, "w": 15, "out": 33}, [4, 8, 1, 32, 1]),
    "few tiles": ({"n": 1, "c": 40, "h": 7, "w": 7, "out": 70}, [4, 4, 1, 64, 1]),
    "2x2 tiles": ({"n": 1, "c": 40, "h": 7, "w": 5, "out": 40}, [2, 14, 1, 64, 1]),
    "stride 2": ({"n": 2, "c": 32, "h": 28, "w": 27, "out": 64, "stride": 2}, [5, 4, 2, 64, 0]),
    "stride 2, by panels": ({"n": 2, "c": 32, "h": 28, "w": 27, "out": 64, "stride": 2}, [5, 30, 1, 16, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "plan"), PLANS.values(), ids=[*PLANS])
def test_every_plan_declines_one_such_pixel(isa: str, sizes: dict, plan: list[int], dtype: torch.dtype):
    layer = Layer(**sizes, dtype=dtype)
    op = Op(layer.n, layer.c, layer.h, layer.w, layer.out, 3, layer.stride)
    ordinary, clean = layer.x, layer.stock(torch.float64)
    assert layer.ours(plan) is not None
    for value in VALUES:
        for n, h, w in pixels(layer.n, layer.h, layer.w):
            layer.x = ordinary.clone()
            layer.x[n, layer.c - 1, h, w] = value
            y = layer.ours(plan)
            # One in the corner of the image is in every window of a tile of 2×2, and spoils nothing.
            if y is not None:
                assert plan[0] == 2
                assert abs(value) == 1e10 or abs(value) == 1e5
                assert_unspoiled(y, layer.stock(dtype), clean, op.reached(n, h, w))


EVERYWHERE = {
    "stem": Op(3, 3, 30, 30, 16, 7, 2),
    "stem of 4 channels": Op(3, 4, 30, 30, 6, 7, 2),
    "3x3": Op(3, 32, 20, 20, 32),
    "3x3 strided": Op(3, 32, 30, 30, 32, stride=2),
}


@pytest.mark.parametrize("op", EVERYWHERE.values(), ids=[*EVERYWHERE])
def test_a_large_pixel_spoils_nothing_wherever_it_is_in_a_tile(isa: str, op: Op):
    """Not where a phase of a strided filter has no tap for it either."""
    x, weight, bias = op.parameters(torch.float32)
    clean = op.stock(x.double(), weight.double(), bias.double())
    for h in range(14):
        for w in range(14):
            bad = x.clone()
            bad[0, :, h, w] = 1e10
            assert_unspoiled(op.ours(bad, weight, bias), op.stock(bad, weight, bias), clean, op.reached(0, h, w))


def test_a_large_pixel_spoils_nothing_wherever_it_is_in_the_phases_of_a_tile(isa: str):
    sizes, plan = PLANS["stride 2"]
    layer = Layer(**sizes, dtype=torch.float32)
    op = Op(layer.n, layer.c, layer.h, layer.w, layer.out, 3, layer.stride)
    ordinary, clean = layer.x, layer.stock(torch.float64)
    for h in range(14):
        for w in range(14):
            layer.x = ordinary.clone()
            layer.x[0, 0, h, w] = 1e10
            y = layer.ours(plan)
            if y is not None:
                assert_unspoiled(y, layer.stock(torch.float32), clean, op.reached(0, h, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basic", [True, False], ids=["basic", "bottleneck"])
def test_blocks_as_a_whole_decline(isa: str, basic: bool, dtype: torch.dtype):
    block = Block(2, 64, 23, 17, 32 if not basic else 64, 64, basic, dtype)
    ordinary = block.x
    for plan in ([1, 1, 2], [2, 3, 2]):
        block.x = ordinary
        assert block.ours(plan) is not None
        for value in VALUES:
            for n, h, w in pixels(2, 23, 17):
                block.x = ordinary.clone()
                block.x[n, :, h, w] = value
                assert block.ours(plan) is None, (value, n, h, w)


def test_a_block_gives_stock_s_answer(isa: str, declined):
    conv = Conv(64, 64, (3, 3), padding=(1, 1))
    problem = problem_of("basic_block", (8, 64, 16, 16), torch.float32, torch.device("cpu"), (conv, conv))
    assert cpu_plan.block_preferred(problem)
    block = Block(8, 64, 16, 16, 64, 64, basic=True)
    clean = block.stock(torch.float64)
    block.x = block.x.clone()
    block.x[3, :, 5, 5] = 1e10
    with rf.use_backend("cpu"):
        y = rf.functional.basic_block(block.x, block.weights, block.biases)
    reached = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    reached[3, :, 3:8, 3:8] = True
    assert_unspoiled(y, block.stock(torch.float32), clean, reached)
    assert declined == ["basic_block"]


def test_a_sentinel_that_fills_whole_tiles(isa: str):
    """Beside them lie tiles that hold it at their edge alone."""
    layer = Layer(n=1, c=32, h=24, w=24, out=32, residual=False)
    for first, last in ((0, 4), (4, 12), (12, 24), (3, 9)):
        layer.x = torch.randn(1, 32, 24, 24).contiguous(memory_format=CL)
        layer.x[:, :, :, first:last] = -9999.0
        assert layer.ours([4, 8, 4, 64, 0]) is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e20], ids=str)
def test_values_of_one_magnitude_are_served_whatever_it_is(isa: str, scale: float):
    """Untrained networks have values beyond all bounds, everywhere."""
    for sizes, plan in PLANS.values():
        layer = Layer(**sizes, relu=False, residual=False)
        layer.x.mul_(scale)
        layer.bias.mul_(scale)
        y = layer.ours(plan)
        assert y is not None
        torch.testing.assert_close(y / scale, layer.stock(torch.float32) / scale, rtol=1e-4, atol=5e-5)


def test_what_is_not_declined_has_a_small_error(isa: str):
    """The limit of uneven.h: a pixel 256 times as large as those that a window holds."""
    for sizes, plan in PLANS.values():
        layer = Layer(**sizes, relu=False, residual=False)
        n, h, w = pixels(layer.n, layer.h, layer.w)[3]
        layer.x[n, 0, h, w] = 256.0
        y = layer.ours(plan)
        assert y is not None
        assert (y - layer.stock(torch.float64)).abs().max() < 3e-4


def test_what_comes_after_in_a_chain_is_not_run_and_memory_goes_back(isa: str):
    layer = Layer(n=1, c=64, h=56, w=56, out=64, residual=False)
    library = torch.ops.resnet_fused_cpu
    weights = library.pack(layer.weight.contiguous(memory_format=CL), True)
    bias = padded_bias(layer.bias * 1e12)

    def record(chain: Chain, x: int, residual: int | None) -> int:
        for _ in range(3):
            x = chain.conv(x, None, weights, bias, 64, 1, [3, 3, 1, 1, 1, 1, 1, 1], RELU, NO_PARAMETERS, [4, 14, 8, 64, 0])
        return x

    conv = Conv(64, 64, (3, 3), padding=(1, 1))
    kernel = ChainKernel(problem_of("conv2d_bn_relu", layer.x.shape, torch.float32, torch.device("cpu"), (conv,)), record)
    kernel(layer.x, None)
    layer.x[0, 0, 0, 0] = math.nan
    library.release_activations()
    for _ in range(50):
        with pytest.raises(Declined):
            kernel(layer.x, None)
    assert library.release_activations() <= 2 * layer.x.nbytes


def test_a_declining_candidate_is_right_and_takes_stock_s_time_too():
    """rf.tune checks candidates with NaN and Inf, and a model may be tuned on inputs that its kernels decline."""
    problem = problem_of(
        "conv2d_bn_relu", (1, 32, 20, 20), torch.float32, torch.device("cpu"), (Conv(32, 32, (3, 3), padding=(1, 1)),)
    )
    folded = ConvParameters((torch.randn(32, 32, 3, 3) / 17,), (torch.randn(32),))
    (name, *_) = [name for name in candidates.names(problem) if name.startswith("cpu:winograd")]
    kernel = candidates.prepare(problem, folded, name)
    assert ProblemCheck(problem, folded).fault(kernel) is None
    x = torch.randn(problem.shape).contiguous(memory_format=CL)
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(Declined):
        get("cpu").prepare(problem, folded)(x, None)
    stock = get("reference").prepare(problem, folded)(x, None)
    assert torch.equal(kernel(x, None).isnan(), stock.isnan())


def test_patterns_of_large_values_do_not_hide_from_the_check(isa: str):
    """The check sees sums of pixels (`watched` in winograd_transforms.h), in which some of them might cancel."""
    for sizes, plan in PLANS.values():
        layer = Layer(**{**sizes, "n": 1}, relu=False, residual=False)
        op = Op(1, layer.c, layer.h, layer.w, layer.out, 3, layer.stride)
        ordinary, clean = layer.x, layer.stock(torch.float64)
        for _ in range(40):
            kind = torch.randint(0, 3, (1, 1, layer.h, layer.w))  # mostly left alone, or one of two sentinels
            kind[torch.rand(kind.shape) < 0.8] = 0
            sentinels = torch.tensor([0.0, 1e10, (-1e10, 2.5e10, 4e9)[int(torch.randint(0, 3, ()))]])
            layer.x = torch.where(kind > 0, sentinels[kind], ordinary).contiguous(memory_format=CL)
            y = layer.ours(plan)
            if y is not None:
                reached = F.conv2d((kind > 0).float(), torch.ones(1, 1, 3, 3), None, op.stride, 1) > 0
                error = (y.double() - clean).abs()[~reached.expand_as(y)]
                assert error.numel() == 0 or error.max() < 1e-4
