"""Exact counts of the convolution kernels on ResNet-50's layers, at most those of NVIDIA CUTLASS at the same tile.

The bounds of CUTLASS were counted in the same way: its optimized fprop with residual and ReLU, float16, compiled for sm_80 and
executed as PTX.
"""

from __future__ import annotations

import functools
import re

import ptx_executor as px
import pytest
import torch
from support.emulated_cuda import A100, Result, conv2d, ptx, stem
from support.problems import problem_of

from resnet_fused.backends import Conv, ConvParameters, Pool

TILE = "conv2d_fwd_f16_128x128x32"
# channels in, size, channels out, filter: executed warp instructions per mma of CUTLASS at 128×128×32
LAYERS = {
    "128_to_128_3x3": (128, 28, 128, 3, 4.5),
    "64_to_64_3x3": (64, 56, 64, 3, 5.5),
    "256_to_64_1x1": (256, 28, 64, 1, 7.9),
}


@functools.cache
def run(layer: str, kernel: str = TILE) -> Result:
    c, size, k, r, _ = LAYERS[layer]
    torch.manual_seed(0)
    x, residual = torch.randn(1, c, size, size).half(), torch.randn(1, k, size, size).half()
    weight = (torch.randn(k, c, r, r) / (c * r * r) ** 0.5).half()
    return conv2d(x, weight, torch.randn(k), residual, padding=(r // 2, r // 2), kernel=kernel, splits=1)


@pytest.mark.parametrize("layer", LAYERS)
def test_instructions_per_mma(layer: str) -> None:
    (counters,) = run(layer).counters
    products = sum(count for count, _ in counters.tensor.values())
    assert sum(counters.warp_instructions.values()) / products <= LAYERS[layer][4]


@pytest.mark.parametrize("layer", LAYERS)
def test_memory_traffic(layer: str) -> None:
    c, size, k, r, _ = LAYERS[layer]
    (counters,) = run(layer).counters
    assert counters.of("cp_async_global").factor <= 1.02
    assert counters.of("global_store").factor == 1.0
    assert counters.global_factor <= 1.02
    assert counters.shared_factor == 1.0
    # Every byte of x, weight, residual and bias is read, and every byte of y written: nothing else is touched.
    pixels = size * size
    assert counters.bytes_read == 2 * (pixels * c + k * c * r * r + pixels * k) + 4 * k
    assert counters.bytes_written == 2 * pixels * k
    # A block reads the part of x and of the weight that it multiplies, once.
    blocks_m, blocks_n = -(-pixels // 128), -(-k // 128)
    taps = (size * r - 2 * (r // 2)) ** 2 if r > 1 else pixels  # positions of the filter that lie in the image, over all pixels
    assert counters.of("cp_async_global").bytes == 2 * c * (taps * blocks_n + r * r * k * blocks_m)


def test_all_global_accesses_are_of_16_bytes() -> None:
    (counters,) = run("64_to_64_3x3").counters
    for (_, kind), line in counters.lines.items():
        if kind.startswith(("global", "cp_async_global")):
            assert re.search(r"\.v4\.|cp\.async\.cg\..*, 16,", line.instruction), line.instruction


STEM = (1, 3, 64, 64)


@functools.cache
def run_stem() -> px.Counters:
    torch.manual_seed(0)
    x, weight = torch.randn(STEM).half(), (torch.randn(64, 3, 7, 7) / 12).half()
    result = conv2d(x, weight, torch.randn(64), stride=(2, 2), padding=(3, 3))
    assert result.kernels == ["conv2d_stem_fwd_f16"]
    return result.counters[0]


def test_stem_reads_each_pixel_about_once() -> None:
    counters = run_stem()
    assert counters.shared_factor == 1.0
    assert counters.of("global_store").factor == 1.0
    assert counters.bytes_read == 2 * (3 * 64 * 64 + 64 * 7 * 24) + 4 * 64
    # A patch has 37 rows of 40 pixels for 16×16 outputs, of which 32×32 are its own.
    patches, weights = 4 * 37 * 256, 4 * 64 * 7 * 24 * 2
    assert counters.of("cp_async_global").bytes <= patches + weights
    assert counters.of("cp_async_global").factor <= 1.02


FORMATS = {"planar": torch.contiguous_format, "interleaved": torch.channels_last}


@functools.cache
def run_whole_stem(order: str) -> px.Counters:
    """The stem with its pool on an image of 224², on a GPU of one multiprocessor: a few strips."""
    torch.manual_seed(0)
    conv, pool = Conv(3, 64, (7, 7), (2, 2), (3, 3)), Pool((3, 3), (2, 2), (1, 1))
    problem = problem_of("stem", (1, 3, 224, 224), torch.float16, torch.device("cpu"), (conv,), pool=pool)
    x = torch.randn(problem.shape).half().contiguous(memory_format=FORMATS[order])
    parameters = ConvParameters((torch.randn(64, 3, 7, 7).half() / 12,), (torch.randn(64).half(),))
    result = stem(problem, x, parameters, [A100[0], 1, *A100[2:]])
    assert result.kernels == [f"stem_fwd_f16_{order}"]
    return result.counters[0]


@pytest.mark.parametrize("order", FORMATS)
def test_the_stem_with_its_pool_touches_each_byte_about_once(order: str) -> None:
    counters, pixels = run_whole_stem(order), 224 * 224
    x, y, weight = 2 * 3 * pixels, 2 * 64 * 56 * 56, 2 * 64 * 147
    assert counters.bytes_written == y
    assert counters.bytes_read + counters.bytes_written <= 1.03 * (x + y + weight)
    assert counters.shared_factor == 1.0
    assert counters.of("cp_async_global").factor == 1.0
    assert counters.of("global_store").factor == 1.0
    # x comes by cp.async alone. A strip's window reaches seven rows further than its own rows.
    strips = 3
    assert counters.of("cp_async_global").bytes == x + (strips - 1) * 7 * 2 * 3 * 224


@pytest.mark.parametrize("order", FORMATS)
def test_the_stem_with_its_pool_repeats_few_products(order: str) -> None:
    counters = run_whole_stem(order)
    needed = 2 * 112 * 112 * 64 * 21 * 8  # filter rows of seven taps and a zero
    assert needed <= counters.flops["tensor"] <= 1.08 * needed
    products = sum(count for count, _ in counters.tensor.values())
    assert sum(counters.warp_instructions.values()) / products <= 6.0


def main_loop(text: str, kernel: str) -> str:
    """PTX of the innermost loop with the products."""
    body = text[text.index(f".entry {kernel}(") :].split(".entry", 2)[1]
    labels = {m.group(1): m.start() for m in re.finditer(r"^(\$L\w+):", body, re.M)}
    loops = [
        body[labels[m.group(1)] : m.end()]
        for m in re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", body)
        if labels.get(m.group(1), m.end()) < m.start()
    ]
    return min((loop for loop in loops if "mma.sync" in loop), key=len)


@pytest.mark.parametrize("kernel", [TILE, "conv2d_fwd_f16_128x256x32", "conv2d_fwd_f16_64x64x64"])
def test_no_division_in_the_main_loop(kernel: str) -> None:
    loop = main_loop(ptx("conv2d_f16", f"sm_{A100[0]}"), kernel)
    assert "cp.async" in loop
    assert not re.search(r"\b(div|rem)\.", loop)
    assert "ld.global" not in loop
