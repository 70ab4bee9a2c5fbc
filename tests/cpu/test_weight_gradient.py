"""resnet_fused_cpu::weight_gradient on each instruction set, against float64 and stock PyTorch."""

from __future__ import annotations

import pytest
import torch
from support.fast_paths import needs_kept_memory
from support.tolerances import assert_as_good_as_stock

CL = torch.channels_last

# n, in_channels, height, width, out_channels, kernel, stride
PIXELS = {
    "1x1": (2, 64, 9, 9, 96, 1, 1),
    "1x1, channel tails": (1, 20, 7, 9, 33, 1, 1),
    "1x1, one channel, one pixel": (1, 1, 1, 1, 1, 1, 1),
    "1x1, many pixels": (4, 36, 40, 41, 70, 1, 1),
    "1x1, many weights": (2, 520, 5, 5, 600, 1, 1),
    "1x1, stride 2": (2, 64, 15, 13, 64, 1, 2),
    "3x3": (2, 40, 8, 9, 48, 3, 1),
    "3x3, stride 2": (2, 70, 15, 14, 48, 3, 2),
    "3x3, stride 2, many pixels": (5, 32, 41, 40, 33, 3, 2),
    "5x5, stride 3": (2, 33, 9, 11, 17, 5, 3),
}
TILES = {
    "whole tiles": (2, 64, 16, 16, 64, 3, 1),
    "odd size and channel tails": (3, 20, 13, 9, 33, 3, 1),
    "one pixel, one channel": (2, 1, 1, 1, 1, 3, 1),
    "several rounds": (3, 256, 21, 22, 130, 3, 1),
}


def tensors(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    n, c, h, w, out, kernel, stride = sizes
    padding = kernel // 2
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=CL)
    out_size = [(size + 2 * padding - kernel) // stride + 1 for size in (h, w)]
    dy = torch.randn(n, out, *out_size).to(dtype).contiguous(memory_format=CL)
    return x, dy, [kernel, stride, padding]


def check(sizes: tuple[int, ...], winograd: bool, dtype: torch.dtype = torch.float32) -> None:
    x, dy, geometry = tensors(sizes, dtype)
    kernel, stride, padding = geometry
    ours = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, *geometry, winograd)
    stock, truth = (
        torch.ops.aten.convolution_backward(
            *(dy.to(t), x.to(t), torch.empty(sizes[4], sizes[1], kernel, kernel, dtype=t), None),
            *([stride, stride], [padding, padding], [1, 1], False, [0, 0], 1, [False, True, False]),
        )[1]
        for t in (torch.float32, torch.float64)
    )
    assert ours.is_contiguous()
    assert_as_good_as_stock(ours.permute(0, 3, 1, 2), stock, truth)


@pytest.mark.parametrize("sizes", PIXELS.values(), ids=[*PIXELS])
def test_by_pixels(isa: str, sizes: tuple[int, ...]):
    check(sizes, winograd=False)


@pytest.mark.parametrize("sizes", PIXELS.values(), ids=[*PIXELS])
def test_by_pixels_bfloat16(sizes: tuple[int, ...]):
    if not torch.ops.resnet_fused_cpu.avx512_bf16():
        pytest.skip("this CPU has no AVX512_BF16; run the tests on one that has")
    check(sizes, winograd=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", TILES.values(), ids=[*TILES])
def test_by_tiles(isa: str, sizes: tuple[int, ...], dtype: torch.dtype):
    check(sizes, winograd=True, dtype=dtype)


@pytest.mark.parametrize(
    ("sizes", "winograd"),
    [((3, 48, 40, 40, 64, 3, 1), False), ((3, 48, 40, 40, 64, 3, 1), True), ((8, 520, 9, 9, 600, 1, 1), False)],
    ids=["pixels", "tiles", "many weights"],
)
def test_result_does_not_depend_on_the_number_of_threads(sizes: tuple[int, ...], winograd: bool):
    x, dy, geometry = tensors(sizes, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.resnet_fused_cpu.weight_gradient(x, dy, *geometry, winograd))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_kept_memory
def test_large_gradients_lie_in_kept_memory():
    x, dy, geometry = tensors((1, 512, 4, 4, 1024, 1, 1), torch.float32)
    first = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, *geometry, False)
    expected, address = first.clone(), first.data_ptr()
    del first
    second = torch.ops.resnet_fused_cpu.weight_gradient(x, dy, *geometry, False)
    assert second.data_ptr() == address
    assert torch.equal(second, expected)


def test_wrong_arguments_are_named():
    x, dy, _ = tensors((1, 16, 8, 8, 16, 3, 1), torch.float32)
    run = torch.ops.resnet_fused_cpu.weight_gradient
    for arguments, message in (
        ((x.contiguous(), dy, 3, 1, 1, False), "x is not channels_last"),
        ((x, dy.double(), 3, 1, 1, False), "dy must be float32 or bfloat16"),
        ((x, dy, 3, 2, 1, False), "shape of this convolution's result"),
        ((x, dy, 1, 1, 0, True), "Winograd serves"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
