"""The planner: what it chooses, what it refuses, and that its launches fit the GPU and cover the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ptx_executor as px
import pytest
import torch
from support.emulated_cuda import A100, T4, module, pack_weight

from resnet_fused.backends import Activation

RTX4090, H100 = [89, 128, 99 << 10, 100 << 10], [90, 132, 227 << 10, 228 << 10]
GPUS = {"t4": T4, "a100": A100, "rtx4090": RTX4090, "h100": H100}
F16, BF16, F32, TF32 = range(4)
FUNCTION = 35  # where Conv2dParams has the function, in 4-byte words after the pointers; its slope follows


def problem(n: int, size: int, c: int, k: int, r: int, stride: int = 1, element: int = F16) -> list[int]:
    pad = r // 2
    return [n, size, size, c, k, r, r, stride, stride, pad, pad, 1, 1, element]


# ResNet-50's layers, and odd ones: batch, size, channels, filter, stride.
LAYERS = {
    "stem": (8, 224, 3, 64, 7, 2),
    "res2_1x1": (8, 56, 64, 256, 1),
    "res2_3x3": (8, 56, 64, 64, 3),
    "res3_strided": (8, 56, 128, 128, 3, 2),
    "res5_3x3": (8, 7, 512, 512, 3),
    "res5_batch_1": (1, 7, 2048, 512, 1),
    "classifier_like": (1, 1, 512, 1000, 1),
    "large_batch": (256, 14, 256, 1024, 1),
    "odd_channels": (2, 30, 20, 50, 3),
    "three_tiles_of_channels": (8, 28, 128, 384, 1),
}


def plan(numbers: list[int], device: list[int], kernel: str = "", splits: int = 0) -> tuple:
    return torch.ops.resnet_fused_cuda.conv2d_plan(numbers, device, [0] * 6, "none", 0.0, kernel, splits)


def test_plans_are_kept_without_arguments() -> None:
    numbers, kept = problem(3, 21, 64, 72, 3), torch.ops.resnet_fused_cuda.conv2d_kept_plans
    before, made = kept(), {}
    functions = [*Activation]
    for pointers, function, slope in (
        ([16, 32, 48, 64, 80, 96], Activation.RELU, 0.0),
        ([0] * 6, Activation.NONE, 0.0),
        ([160, 320, 480, 640, 800, 960], Activation.LEAKY_RELU, 0.25),
    ):
        arguments = numbers, A100, pointers, function.value, slope, "", 2
        names, launches, params, workspace = torch.ops.resnet_fused_cuda.conv2d_plan(*arguments)
        assert params[:6] == pointers
        words = np.array(params[6:], np.int64).view(np.int32)
        assert words[FUNCTION] == functions.index(function)
        assert words[FUNCTION + 1 :].view(np.float32)[0] == slope
        words[FUNCTION : FUNCTION + 2] = 0
        made[function] = (names, launches, words.tolist(), workspace)
    assert kept() == before + 1
    assert len({str(plan) for plan in made.values()}) == 1
    # What a plan depends on tells it from others.
    kernels = torch.ops.resnet_fused_cuda.conv2d_kernels(numbers, A100)
    others = [
        (numbers, A100, "", 1),
        (numbers, A100, kernels[-1], 2),
        (numbers, H100, "", 2),
        ([4, *numbers[1:]], A100, "", 2),
    ]
    for count, (own, device, kernel, splits) in enumerate(others, 2):
        params = plan(own, device, kernel, splits)[2]
        assert params[5] == 0
        assert kept() == before + count
    assert plan(numbers, A100, kernels[-1], 2)[0][0] == kernels[-1]


def test_threads_share_plans() -> None:
    numbers = [problem(2, size, 32, 32, 3) for size in range(5, 45)]
    alone = [plan(own, T4) for own in numbers]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [plan(own, RTX4090) and plan(own, T4) for own in numbers], range(8)):
            assert found == alone


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("element", [F16, BF16, F32, TF32], ids=["float16", "bfloat16", "float32", "tf32"])
def test_launches_fit_the_gpu_and_cover_the_result(gpu: str, element: int) -> None:
    device = GPUS[gpu]
    if device[0] < 80 and element in (BF16, TF32):
        with pytest.raises(ValueError, match="no kernel"):
            plan(problem(*LAYERS["res2_3x3"], element=element), device)
        return
    for layer in LAYERS.values():
        numbers = problem(*layer, element=element)
        kernels, launches, _, workspace = plan(numbers, device)
        n, size, _, k, r = layer[:5]
        out = (size + 2 * (r // 2) - r) // numbers[7] + 1
        assert (len(kernels) == 2) == (workspace > 0)
        for i, kernel in enumerate(kernels):
            x, y, z, threads, shared = launches[5 * i : 5 * i + 5]
            assert threads <= 1024
            assert shared <= device[2]
            assert y <= 65535
            assert z <= 65535
            if "stem" in kernel or "reduce" in kernel:
                continue
            tile_m, tile_n = map(int, kernel.split("_")[-1].split("x")[:2])
            needed = -(-n * out * out // tile_m) * -(-k // tile_n)
            assert needed <= x * y <= needed * 9 / 8  # blocks without work are rare
            assert workspace == (z * n * out * out * -(-k // 4) * 16 if z > 1 else 0)


def test_choices_by_size_of_the_problem() -> None:
    # A layer that fills the GPU gets a tile of many products a byte; one of few blocks a small tile or a split of k.
    large = plan(problem(64, 56, 256, 256, 3), A100)
    assert large[0][0].rsplit("_", 1)[1] in ("128x256x32", "256x128x32")
    small = plan(problem(1, 7, 512, 512, 3), A100)
    assert small[0][0].endswith("64x64x64")
    assert small[1][2] > 1
    assert plan(problem(8, 224, 3, 64, 7, 2), A100)[0] == ["conv2d_stem_fwd_f16"]


def test_kernels_are_all_that_serve_and_the_chosen_one_first() -> None:
    numbers = problem(*LAYERS["res2_3x3"])
    kernels = torch.ops.resnet_fused_cuda.conv2d_kernels(numbers, A100)
    assert kernels[0] == plan(numbers, A100)[0][0]
    assert len(kernels) == len(set(kernels)) == 7
    for kernel in kernels:
        assert plan(numbers, A100, kernel)[0][0] == kernel


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        pytest.param(problem(1, 4, 8, 8, 17), "filter 17x17; the kernels serve up to 16 rows and 15 columns", id="filter"),
        pytest.param(problem(1, 4, 0, 8, 1), "0 channels in and 8 out; there must be some", id="no_channels"),
        pytest.param(problem(1, 4, 8, 1 << 23, 1), "output channels; the grid has room for", id="channels"),
        pytest.param([1, 2, 2, 8, 8, 5, 5, 1, 1, 0, 0, 1, 1, F16], "does not fit the padded input of 2x2", id="no_output"),
        pytest.param(problem(1 << 20, 64, 8, 8, 1), "output pixels; the kernels count them in 31 bits", id="pixels"),
    ],
)
def test_refusals_give_the_reason(numbers: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(numbers, A100)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(ValueError, match="activation is 'softplus'; it must be one of Activation"):
        torch.ops.resnet_fused_cuda.conv2d_plan(problem(1, 4, 8, 8, 1), A100, [0] * 6, "softplus", 0.0, "", 0)


def test_offsets_beyond_32_bits() -> None:
    # Filter rows 2^40 bytes apart: each output pixel has one of its two filter rows in the image, which is a single row at x,
    # so that all that is read lies there, if no offset on the way loses its upper bits.
    memory, x, weight = px.Memory(), torch.randn(1, 16, 1, 5).half(), torch.randn(24, 16, 2, 1).half()
    numbers = [1, 1, 5, 16, 24, 2, 1, 1, 1, 1, 0, 1, 1, F16]
    packed = pack_weight(weight, torch.ops.resnet_fused_cuda.conv2d_weight_layout(numbers), False)
    y = memory.empty(2 * 5 * 24 * 2)
    pointers = [
        memory.upload(x.permute(0, 2, 3, 1).contiguous()),
        memory.upload(packed),
        memory.upload(torch.zeros(24)),
        0,
        y,
        0,
    ]
    (kernel,), launches, params, _ = torch.ops.resnet_fused_cuda.conv2d_plan(numbers, A100, pointers, "none", 0.0, "", 1)
    row_stride, row_delta = 7, 9  # behind six pointers and image_stride; behind run_delta
    assert params[row_stride] == 5 * 16 * 2
    params[row_delta] += (1 << 40) - params[row_stride]
    params[row_stride] = 1 << 40
    *grid, block, shared = launches
    module("conv2d_f16", "sm_80").launch(kernel, grid, block, [np.array(params, np.int64).tobytes()], shared, memory)
    result = memory.download(y, torch.float16, (1, 2, 5, 24)).permute(0, 3, 1, 2)
    truth = torch.nn.functional.conv2d(x.double(), weight.double(), padding=(1, 0))
    torch.testing.assert_close(result.double(), truth, rtol=1e-3, atol=1e-3)


def test_tensors_of_more_than_2_to_the_31_elements_are_served() -> None:
    numbers = problem(256, 224, 256, 64, 3)
    params = plan(numbers, A100)[2]
    assert 256 * params[6] == 2 * 256 * 224 * 224 * 256 > 1 << 32  # bytes of x by its image_stride, and more elements than 2^31
