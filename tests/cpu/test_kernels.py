"""The compiled operators, layer by layer and block by block, on each instruction set, against float64 and stock PyTorch."""

from __future__ import annotations

import pytest
import torch
from support.cpu_layers import Block, Layer
from support.fast_paths import needs_kept_memory
from support.tolerances import assert_as_good_as_stock

# Plans: output tile, tiles together, panels together, channel chunk, by panels.
BY_TILES, BY_PANELS = [4, 8, 4, 64, 0], [4, 8, 1, 32, 1]
ALL_TILES, SMALL_TILES = [4, 1000, 1, 64, 1], [2, 14, 1, 64, 1]
STRIDE_2, STRIDE_2_BY_PANELS = [5, 4, 2, 64, 0], [5, 30, 1, 16, 1]

WINOGRAD = {
    "whole tiles": ({"n": 2, "c": 64, "h": 16, "w": 16, "out": 64}, BY_TILES),
    "whole tiles, by panels": ({"n": 2, "c": 64, "h": 16, "w": 16, "out": 64}, BY_PANELS),
    "odd size and channel tails": ({"n": 3, "c": 20, "h": 13, "w": 9, "out": 33}, BY_TILES),
    "odd size and channel tails, by panels": ({"n": 3, "c": 20, "h": 13, "w": 9, "out": 33}, BY_PANELS),
    "one block of all tiles": ({"n": 1, "c": 48, "h": 7, "w": 7, "out": 70}, ALL_TILES),
    "up to four tiles, short ones": ({"n": 1, "c": 40, "h": 7, "w": 7, "out": 70}, [4, 4, 1, 64, 1]),
    "up to four tiles, whole ones": ({"n": 1, "c": 33, "h": 8, "w": 8, "out": 33}, [4, 4, 1, 64, 1]),
    "up to four tiles, 3 and more are short": ({"n": 1, "c": 16, "h": 5, "w": 6, "out": 64}, [4, 4, 1, 64, 1]),
    "three tiles of two images": ({"n": 3, "c": 48, "h": 3, "w": 4, "out": 32, "residual": False}, [4, 4, 1, 64, 1]),
    "up to four tiles, in several blocks": ({"n": 1, "c": 40, "h": 7, "w": 7, "out": 70}, [4, 3, 1, 32, 1]),
    "up to four 2x2 tiles": ({"n": 1, "c": 40, "h": 3, "w": 4, "out": 40}, [2, 4, 1, 64, 1]),
    "two tiles": ({"n": 2, "c": 40, "h": 3, "w": 4, "out": 40}, [4, 2, 1, 64, 1]),
    "up to four tiles, bfloat16": ({"n": 1, "c": 36, "h": 7, "w": 7, "out": 40, "dtype": torch.bfloat16}, [4, 4, 1, 64, 1]),
    "up to four tiles, float16": ({"n": 1, "c": 36, "h": 7, "w": 7, "out": 40, "dtype": torch.float16}, [4, 4, 1, 64, 1]),
    "short tiles of several images in a block": ({"n": 3, "c": 32, "h": 14, "w": 14, "out": 32}, [4, 20, 2, 64, 0]),
    "short tiles of several images in a block, by panels": ({"n": 3, "c": 32, "h": 14, "w": 11, "out": 32}, [4, 20, 1, 64, 1]),
    "2x2 tiles": ({"n": 1, "c": 40, "h": 7, "w": 5, "out": 40}, SMALL_TILES),
    "one pixel, one channel": ({"n": 2, "c": 1, "h": 1, "w": 1, "out": 1}, BY_TILES),
    "one row": ({"n": 1, "c": 16, "h": 1, "w": 30, "out": 16}, BY_PANELS),
    "no residual, no ReLU": ({"n": 1, "c": 32, "h": 14, "w": 14, "out": 32, "residual": False, "relu": False}, BY_TILES),
    "more input channels than a chunk": ({"n": 1, "c": 100, "h": 6, "w": 6, "out": 32}, BY_PANELS),
    "more tiles than are transformed at once": ({"n": 4, "c": 512, "h": 30, "w": 32, "out": 16}, [4, 32, 1, 64, 1]),
    "bfloat16": ({"n": 1, "c": 36, "h": 11, "w": 10, "out": 40, "dtype": torch.bfloat16}, BY_TILES),
    "bfloat16, by panels": ({"n": 1, "c": 36, "h": 11, "w": 10, "out": 40, "dtype": torch.bfloat16}, BY_PANELS),
    "float16": ({"n": 1, "c": 36, "h": 11, "w": 10, "out": 40, "dtype": torch.float16}, BY_TILES),
    "float16, by panels": ({"n": 1, "c": 36, "h": 11, "w": 10, "out": 40, "dtype": torch.float16}, BY_PANELS),
    "float16, stride 2, tail": ({"n": 1, "c": 16, "h": 13, "w": 9, "out": 33, "stride": 2, "dtype": torch.float16}, STRIDE_2),
    "stride 2": ({"n": 2, "c": 32, "h": 28, "w": 28, "out": 64, "stride": 2}, STRIDE_2),
    "stride 2, by panels": ({"n": 2, "c": 32, "h": 28, "w": 28, "out": 64, "stride": 2}, STRIDE_2_BY_PANELS),
    "stride 2, odd, tail": ({"n": 1, "c": 16, "h": 13, "w": 9, "out": 33, "stride": 2}, STRIDE_2),
    "stride 2, odd, tail, by panels": (
        {"n": 1, "c": 48, "h": 13, "w": 9, "out": 33, "stride": 2},
        STRIDE_2_BY_PANELS,
    ),
    "stride 2, short tiles": ({"n": 2, "c": 16, "h": 28, "w": 18, "out": 32, "stride": 2}, STRIDE_2),
    "stride 2, one pixel": ({"n": 1, "c": 16, "h": 1, "w": 1, "out": 5, "stride": 2}, STRIDE_2),
}

DIRECT = {
    "1x1": ({"n": 2, "c": 64, "h": 9, "w": 9, "out": 96, "kernel": 1, "padding": 0}, []),
    "1x1, channel tails": ({"n": 1, "c": 20, "h": 7, "w": 9, "out": 33, "kernel": 1, "padding": 0}, []),
    "1x1, rows 4 KiB apart": ({"n": 1, "c": 1024, "h": 6, "w": 5, "out": 40, "kernel": 1, "padding": 0}, []),
    "1x1, large weights": ({"n": 1, "c": 512, "h": 5, "w": 5, "out": 300, "kernel": 1, "padding": 0}, []),
    "1x1, stride 2, odd size": ({"n": 2, "c": 64, "h": 15, "w": 13, "out": 64, "kernel": 1, "padding": 0, "stride": 2}, []),
    "1x1 with padding": ({"n": 1, "c": 16, "h": 5, "w": 5, "out": 16, "kernel": 1, "padding": 1}, []),
    "3x3, stride 2": ({"n": 2, "c": 40, "h": 15, "w": 14, "out": 48, "stride": 2}, []),
    "3x3, stride 2, two lines a tile and one more": ({"n": 1, "c": 20, "h": 13, "w": 14, "out": 33, "stride": 2}, []),
    "3x3, stride 2, two lines of three a tile": ({"n": 2, "c": 32, "h": 7, "w": 5, "out": 40, "stride": 2}, []),
    "3x3, dilation 2": ({"n": 1, "c": 20, "h": 9, "w": 11, "out": 33, "padding": 2, "dilation": 2}, []),
    "5x5, stride 3": ({"n": 2, "c": 33, "h": 9, "w": 11, "out": 17, "kernel": 5, "stride": 3}, []),
    "few pixels of many images": ({"n": 9, "c": 37, "h": 5, "w": 6, "out": 50, "stride": 2}, []),
    "7x7, three channels": ({"n": 1, "c": 3, "h": 17, "w": 19, "out": 40, "kernel": 7, "stride": 2, "padding": 3}, []),
    "one pixel": ({"n": 1, "c": 5, "h": 1, "w": 1, "out": 3, "kernel": 1, "padding": 0}, []),
}

BFLOAT16_DIRECT = {
    "1x1": ({"n": 2, "c": 64, "h": 9, "w": 9, "out": 96, "kernel": 1, "padding": 0}, []),
    "1x1, channel tails": ({"n": 1, "c": 22, "h": 7, "w": 9, "out": 33, "kernel": 1, "padding": 0}, []),
    "1x1, rows 4 KiB apart": ({"n": 1, "c": 2048, "h": 5, "w": 5, "out": 40, "kernel": 1, "padding": 0}, []),
    "1x1, stride 2": ({"n": 2, "c": 64, "h": 15, "w": 13, "out": 64, "kernel": 1, "padding": 0, "stride": 2}, []),
    "3x3, stride 2": ({"n": 1, "c": 40, "h": 15, "w": 14, "out": 48, "stride": 2, "residual": False}, []),
    "3x3, stride 2, two lines a tile and one more": ({"n": 1, "c": 20, "h": 9, "w": 10, "out": 33, "stride": 2}, []),
    "3x3, dilation 2": ({"n": 1, "c": 6, "h": 9, "w": 11, "out": 33, "padding": 2, "dilation": 2}, []),
    "few pixels of many images": ({"n": 9, "c": 38, "h": 4, "w": 6, "out": 50, "padding": 2, "dilation": 2}, []),
    # With an odd number there are no pairs of channels, and bfloat16 is widened on every CPU.
    "1x1, odd": ({"n": 2, "c": 65, "h": 9, "w": 9, "out": 96, "kernel": 1, "padding": 0}, []),
    "1x1, odd, stride 2": ({"n": 2, "c": 33, "h": 15, "w": 13, "out": 65, "kernel": 1, "padding": 0, "stride": 2}, []),
    "3x3, odd, stride 2": ({"n": 1, "c": 37, "h": 15, "w": 14, "out": 48, "stride": 2}, []),
    "7x7, three channels": ({"n": 1, "c": 3, "h": 17, "w": 19, "out": 40, "kernel": 7, "stride": 2, "padding": 3}, []),
}

# The same code but for loads and stores: a case for each kind of these.
FLOAT16_DIRECT = ("1x1, channel tails", "1x1, rows 4 KiB apart", "1x1, stride 2", "3x3, stride 2", "7x7, three channels")

BLOCKS = {
    "bottleneck": ({"n": 2, "c": 64, "h": 20, "w": 20, "width": 32, "out": 64}, [1, 1, 2]),
    "bottleneck, projection": ({"n": 1, "c": 64, "h": 13, "w": 11, "width": 32, "out": 128}, [2, 1, 1]),
    "bottleneck in parts": ({"n": 1, "c": 64, "h": 23, "w": 9, "width": 32, "out": 64}, [1, 3, 4]),
    "bottleneck, channel tails": ({"n": 1, "c": 40, "h": 5, "w": 7, "width": 24, "out": 40}, [2, 2, 8]),
    "bottleneck, rows 4 KiB apart": ({"n": 1, "c": 1024, "h": 9, "w": 8, "width": 16, "out": 1024}, [2, 1, 1]),
    "bottleneck, one pixel": ({"n": 1, "c": 64, "h": 1, "w": 1, "width": 64, "out": 64}, [1, 1, 2]),
    "basic": ({"n": 2, "c": 32, "h": 20, "w": 20, "width": 32, "out": 32, "basic": True}, [1, 1, 2]),
    "basic, projection": ({"n": 1, "c": 32, "h": 13, "w": 11, "width": 48, "out": 64, "basic": True}, [2, 1, 1]),
    "basic in parts": ({"n": 1, "c": 40, "h": 23, "w": 9, "width": 24, "out": 40, "basic": True}, [1, 3, 4]),
    "basic, one strip": ({"n": 1, "c": 32, "h": 7, "w": 7, "width": 32, "out": 32, "basic": True}, [20, 1, 2]),
}

FLOAT16_BLOCKS = ("bottleneck, projection", "bottleneck, channel tails", "basic, projection", "basic in parts")


def listed(cases: dict[str, tuple[dict, list[int]]]):
    return pytest.mark.parametrize(("sizes", "plan"), cases.values(), ids=[*cases])


def check(layer: Layer | Block, plan: list[int], dtype: torch.dtype = torch.float32) -> None:
    y = layer.ours(plan)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_good_as_stock(y, layer.stock(dtype), layer.stock(torch.float64))


@listed(WINOGRAD)
def test_winograd(isa: str, sizes: dict, plan: list[int]):
    check(Layer(**sizes), plan, sizes.get("dtype", torch.float32))


@listed(DIRECT)
def test_direct(isa: str, sizes: dict, plan: list[int]):
    check(Layer(**sizes), plan)


@listed(BFLOAT16_DIRECT)
def test_direct_bfloat16(isa: str, sizes: dict, plan: list[int]):
    check(Layer(**sizes, dtype=torch.bfloat16), plan, torch.bfloat16)


@listed({name: BFLOAT16_DIRECT[name] for name in FLOAT16_DIRECT})
def test_direct_float16(isa: str, sizes: dict, plan: list[int]):
    check(Layer(**sizes, dtype=torch.float16), plan, torch.float16)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("out", [32, 33], ids=["whole-panels", "a-tail"])
def test_float16_overflows_where_stock_does(isa: str, kernel: int, out: int):
    """Before the residual, which would bring the result back; and neither NaN nor subnormal numbers are lost."""
    layer = Layer(n=1, c=16, h=6, w=7, out=out, kernel=kernel, padding=kernel // 2, relu=False, dtype=torch.float16)
    layer.weight.zero_(), layer.bias.zero_()
    layer.weight[:, 0, kernel // 2, kernel // 2] = 2
    values = [40000.0, -40000.0, 32752.0, 32768.0, float("nan"), float("inf"), -float("inf"), 2.0**-24, -(2.0**-15), 0.0]
    layer.x[0, 0].zero_()
    layer.x[0, 0].view(-1)[: len(values)] = torch.tensor(values, dtype=torch.float16)
    assert layer.added is not None
    layer.added.zero_()
    layer.added[0, :, 0, 0], layer.added[0, :, 0, 1] = -50000.0, 50000.0
    got, want = layer.ours([]), layer.stock(torch.float16)
    assert want[0, 0, 0, 0] == float("inf"), "stock rounds before it adds"
    assert want[0, 0, 1, 0] == 2.0**-23, "stock keeps subnormal numbers"
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@listed(BLOCKS)
def test_block(isa: str, sizes: dict, plan: list[int]):
    check(Block(**sizes), plan)


@listed(BLOCKS)
def test_block_bfloat16(isa: str, sizes: dict, plan: list[int]):
    check(Block(**sizes, dtype=torch.bfloat16), plan, torch.bfloat16)


@listed({name: BLOCKS[name] for name in FLOAT16_BLOCKS})
def test_block_float16(isa: str, sizes: dict, plan: list[int]):
    check(Block(**sizes, dtype=torch.float16), plan, torch.float16)


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        pytest.param([], {"kernel": 1, "padding": 0}, id="1x1"),
        pytest.param([], {"stride": 2}, id="direct"),
        pytest.param(BY_TILES, {}, id="winograd"),
        pytest.param(STRIDE_2, {"stride": 2}, id="winograd-stride-2"),
    ],
)
def test_nan_and_inf_survive_the_relu(isa: str, plan: list[int], sizes: dict):
    layer = Layer(n=1, c=16, h=20, w=20, out=32, **sizes)
    if not plan:  # Winograd declines them in x; they may still come with the residual
        layer.x[0, 3, 5, 5] = float("nan")
        layer.x[0, 4, 15, 15] = float("inf")
    # A negative NaN, the kind that the CPU makes of Inf - Inf.
    assert layer.added is not None
    layer.added[0, 0, 0, 0] = -torch.tensor(float("nan"))
    layer.added[0, 1, 5, 5] = float("inf")
    assert_as_good_as_stock(layer.ours(plan), layer.stock(torch.float32), layer.stock(torch.float64))


@needs_kept_memory
def test_results_in_kept_memory_are_written_whole(isa: str):
    """Results of 1 MiB and more lie in memory that is used again; here it is full of NaN from before."""
    layer = Layer(n=2, c=16, h=56, w=57, out=64)
    layer.ours(BY_TILES).fill_(float("nan"))
    check(layer, BY_TILES)
    assert torch.ops.resnet_fused_cpu.release_activations() > 0
    assert torch.ops.resnet_fused_cpu.release_activations() == 0


def test_several_threads_share_nothing_but_weights():
    """Calls from several Python threads at once, each with its own input, give what they give one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    layers = [Layer(n=1, c=32, h=20 + i, w=20, out=64) for i in range(4)]
    plans = [BY_TILES, BY_PANELS, ALL_TILES, BY_TILES]
    want = [layer.ours(plan) for layer, plan in zip(layers, plans, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for y, expected in zip(pool.map(Layer.ours, layers, plans), want, strict=True):
                assert torch.equal(y, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads: int):
    before = torch.get_num_threads()
    layer = Layer(n=2, c=32, h=30, w=30, out=64)
    want = layer.ours(BY_TILES)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layer.ours(BY_TILES), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.randn(1, 16, 8, 8)}, "not channels_last", id="contiguous"),
        pytest.param({"x": torch.randn(1, 16, 8, 8).double()}, "float32, bfloat16 or float16", id="double"),
        pytest.param({"weight": torch.randn(16, 8, 3, 3)}, "packed weights of this problem", id="weights"),
        pytest.param(
            {"added": torch.randn(1, 16, 7, 8).contiguous(memory_format=torch.channels_last)}, "residual", id="residual"
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str):
    layer = Layer(n=1, c=16, h=8, w=8, out=16)
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match=message):
        layer.ours([])


@pytest.mark.parametrize(
    "plan", [[4, 8, 4, 64], [3, 8, 4, 64, 0], [4, 0, 4, 64, 0], [4, 8, 4, 20, 1]], ids=["short", "tile", "zero", "chunk"]
)
def test_impossible_plans_are_refused(plan: list[int]):
    with pytest.raises(ValueError, match="plan"):
        Layer(n=1, c=16, h=8, w=8, out=16).ours(plan)
