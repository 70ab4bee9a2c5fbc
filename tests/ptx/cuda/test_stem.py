"""The stem's kernels with the pool, executed from their PTX, against float64: the edges of tiles, strips and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ptx_executor as px
import pytest
import torch
import torch.nn.functional as F
from support.emulated_cuda import A100, H100, T4, launch, stem, stem_packed
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused import tuning
from resnet_fused.backends import Conv, ConvParameters, Pool, Problem, binding, get
from resnet_fused.backends.cuda import device as cuda_device
from resnet_fused.backends.cuda.stem import pack_weight, plan_problem
from resnet_fused.backends.tuning_cache import PARTS

F16, BF16 = torch.float16, torch.bfloat16
PLANAR, INTERLEAVED = torch.contiguous_format, torch.channels_last
CONV, POOL = Conv(3, 64, (7, 7), (2, 2), (3, 3)), Pool((3, 3), (2, 2), (1, 1))
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Images of `batch` × 3 × `height` × `width`; `rows`: of the result, of a strip."""

    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = F16
    format: torch.memory_format = PLANAR
    rows: int = 0

    @property
    def problem(self) -> Problem:
        return problem_of("stem", (self.batch, 3, self.height, self.width), self.dtype, CPU, (CONV,), pool=POOL)

    def tensors(self) -> tuple[Tensor, ConvParameters]:
        x = torch.randn(self.problem.shape).to(self.dtype).contiguous(memory_format=self.format)
        return x, ConvParameters((torch.randn(64, 3, 7, 7) / 12,), (torch.randn(64) / 2,)).to(self.dtype)

    def run(self, x: Tensor, parameters: ConvParameters) -> Tensor:
        result = stem(self.problem, x, parameters, A100, self.rows)
        order = "planar" if self.format == PLANAR else "interleaved"
        assert result.kernels == [f"stem_fwd_{'f16' if self.dtype == F16 else 'bf16'}_{order}"]
        return result.y

    def check(self, x: Tensor, parameters: ConvParameters) -> None:
        ours = self.run(x, parameters)
        assert_as_good_as_stock(ours, stock(x, parameters), stock(x.double(), parameters.to(torch.float64)))


def stock(x: Tensor, parameters: ConvParameters) -> Tensor:
    """Stock PyTorch's ops, one after the other, in the tensors' dtype."""
    (weight,), (bias,) = parameters.tensors()
    return F.max_pool2d(F.conv2d(x, weight, bias, 2, 3).relu(), 3, 2, 1)


CASES = {
    "one_row_of_one_pooled_pixel": Case(1, 8),
    "fewer_rows_than_a_window": Case(2, 16, batch=3, dtype=BF16),
    "a_row_of_the_convolution_without_its_pair": Case(21, 40, rows=2),
    "an_even_number_of_rows": Case(22, 40, format=INTERLEAVED, rows=2),
    "rows_that_end_in_each_group_13": Case(13, 24, batch=2, rows=4),
    "rows_that_end_in_each_group_14": Case(14, 24, format=INTERLEAVED, rows=4),
    "rows_that_end_in_each_group_15": Case(15, 24, dtype=BF16, rows=4),
    "a_strip_of_many_rows": Case(61, 32, rows=16),
    "a_strip_of_many_interleaved_rows": Case(61, 32, format=INTERLEAVED, rows=16),
    "strips_of_one_row": Case(29, 64, batch=2, format=INTERLEAVED, dtype=BF16, rows=1),
    "a_last_strip_of_fewer_rows": Case(39, 48, rows=4),
    "the_last_tile_has_half_its_pixels": Case(12, 80, format=INTERLEAVED),
    "the_last_tile_has_a_quarter_of_its_pixels": Case(12, 232),
    "more_columns_than_a_warp_copies_at_once": Case(8, 520, dtype=BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    CASES[name].check(*CASES[name].tensors())


FORMATS = pytest.mark.parametrize("format", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])


@FORMATS
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_nan_and_infinity_stay_where_stock_has_them(format: torch.memory_format, dtype: torch.dtype) -> None:
    case = Case(40, 48, batch=2, dtype=dtype, format=format, rows=3)
    x, parameters = case.tensors()
    # In the middle, in corners, and at every column of some rows, so at each place in and beside windows and tiles.
    x[0, 0, 20, 24], x[0, 2, 0, 0], x[0, 1, -1, -1] = torch.nan, torch.inf, -torch.inf
    for row, column in enumerate(range(0, 48, 5)):
        x[1, row % 3, 4 * row, column] = torch.inf if row % 2 else torch.nan
    # oneDNN's bfloat16 makes NaN of infinities that its zeros meet, so stock's float32 is the yardstick.
    yardstick = stock(x.float(), parameters.to(torch.float32)).to(dtype)
    assert_as_good_as_stock(case.run(x, parameters), yardstick, stock(x.double(), parameters.to(torch.float64)))


def test_what_is_infinite_beside_a_window_is_not_seen_in_it() -> None:
    case = Case(8, 32)
    x, parameters = case.tensors()
    x[0, :, :, ::8] = torch.inf  # the word of the first tap has the column before it in its lower half
    parameters.weights[0][:] = parameters.weights[0].abs()
    case.check(x, parameters)


@FORMATS
def test_a_sum_beyond_float16_is_infinite_as_in_stock(format: torch.memory_format) -> None:
    case = Case(24, 32, format=format)
    x, parameters = case.tensors()
    (weight,), (bias,) = parameters.tensors()
    weight[:16], bias[:16] = weight[:16] * 200, 65_000.0
    weight[16:32], bias[16:32] = weight[16:32] * 200, -65_000.0
    expected = stock(x, parameters)
    assert 0 < expected.isinf().sum() < expected.numel() / 2
    assert torch.equal(case.run(x, parameters).isinf(), expected.isinf())


def test_images_are_no_neighbours() -> None:
    case = Case(20, 24, batch=3, rows=2)
    x, parameters = case.tensors()
    together = case.run(x, parameters)
    for i, image in enumerate(x):
        assert torch.equal(together[i : i + 1], Case(20, 24, rows=2).run(image[None], parameters))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_strips_are_no_matter(rows: int) -> None:
    x, parameters = Case(44, 40).tensors()
    assert torch.equal(Case(44, 40, rows=rows).run(x, parameters), Case(44, 40, rows=11).run(x, parameters))


@FORMATS
def test_a_part_of_larger_images_is_read_where_it_lies(format: torch.memory_format) -> None:
    case, memory = Case(20, 24, batch=2, format=format), px.Memory()
    _, parameters = case.tensors()
    (weight,), (bias,) = parameters.tensors()
    large = torch.randn(2, 3, 30, 56).half().contiguous(memory_format=format)
    x = large[:, :, 2:22, 16:40]
    address = memory.upload(large) + 2 * x.storage_offset()
    pointers = [address, memory.upload(pack_weight(weight)), memory.upload(bias.float()), memory.empty(2 * 64 * 5 * 6 * 2)]
    launch(torch.ops.resnet_fused_cuda.stem_plan(plan_problem(case.problem), x.stride(), A100, pointers, 2), memory, A100)
    y = memory.download(pointers[3], F16, (2, 5, 6, 64)).permute(0, 3, 1, 2)
    assert_as_good_as_stock(y, stock(x, parameters), stock(x.double(), parameters.to(torch.float64)))


# ---- the planner ------------------------------------------------------------------------------------------------------------


def plan(numbers: list[int], device: Sequence[int] = A100) -> tuple:
    _, h, w, _, _ = numbers
    return torch.ops.resnet_fused_cuda.stem_plan(numbers, [3 * h * w, h * w, w, 1], device, [0] * 4, 0)


@pytest.mark.parametrize(
    ("numbers", "device", "reason"),
    [
        pytest.param([1, 224, 224, 64, 2], A100, "it serves float16 and bfloat16", id="float32"),
        pytest.param([1, 224, 224, 32, 0], A100, "64 output channels, not 32", id="channels"),
        pytest.param([1, 224, 224, 64, 0], T4, "compute capability 8.0 or newer, not 7.5", id="old_gpu"),
        pytest.param([0, 224, 224, 64, 0], A100, "the input is empty", id="empty"),
        pytest.param([1, 224, 227, 64, 0], A100, "a width that is a multiple of 8, not 227", id="odd_width"),
        pytest.param([1, 224, 2048, 64, 0], A100, "a row of 2048 pixels is too wide", id="wide"),
        pytest.param([1, 1 << 20, 8, 64, 0], A100, "a size beyond the grid's", id="high"),
    ],
)
def test_refusals_give_the_reason(numbers: list[int], device: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(numbers, device)


@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_strips_fill_the_gpu_and_repeat_little(batch: int) -> None:
    _, (images, strips, _, _, shared), _, _ = plan([batch, 224, 224, 64, 0], [90, 132, 227 << 10, 228 << 10])
    assert images == batch
    assert 6 * (shared + 1024) <= 228 << 10  # as many blocks as registers allow
    # Each strip but the first repeats one row of the convolution's 112.
    assert batch < 256 or (strips - 1) / 112 < 0.02
    assert batch * strips >= min(2 * 132, batch * 56)


def test_tensors_of_more_than_2_to_the_31_elements_are_served() -> None:
    numbers = [50_000, 224, 224, 64, 0]
    params = plan(numbers)[2]
    assert params[4] == 2 * 3 * 224 * 224
    assert 50_000 * params[4] > 1 << 33


# ---- the backend ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "properties", lambda device: A100)
    monkeypatch.setattr(type(get("cuda")), "unavailable", lambda self: None)


def on_gpu(
    shape: tuple[int, int, int, int] = (1, 3, 32, 40), conv: Conv = CONV, pool: Pool = POOL, dtype=F16, **other
) -> Problem:
    return problem_of("stem", shape, dtype, GPU, (conv,), pool=pool, **other)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        pytest.param(on_gpu(conv=Conv(3, 64, (3, 3), (2, 2), (1, 1))), "a 7×7 convolution of stride 2", id="filter"),
        pytest.param(on_gpu((1, 1, 32, 40), CONV._replace(in_channels=1)), "on 3 channels", id="channels"),
        pytest.param(on_gpu(pool=Pool((2, 2), (2, 2), (0, 0))), "a max-pool of 3×3, stride 2 and padding 1", id="pool"),
        pytest.param(on_gpu((1, 3, 31, 33)), "a width that is a multiple of 8, not 33", id="width"),
        pytest.param(on_gpu(dtype=torch.float32), "it serves float16 and bfloat16", id="float32"),
    ],
)
def test_the_backend_says_why_it_takes_no_pool(asked: Problem, reason: str, gpu: None) -> None:
    assert reason in get("cuda").why_not(asked)


def test_it_is_a_candidate_that_no_rule_takes(gpu: None) -> None:
    asked = on_gpu()
    assert get("cuda").why_not(asked) is None
    assert not get("cuda").preferred(asked)
    assert binding.rules(asked) == PARTS
    assert tuning.candidates.names(asked) == [f"cuda:strips_of_{rows}" for rows in (1, 2, 3, 4)] + ["reference", PARTS]


def test_it_is_preferred_on_the_gpu_that_it_was_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "properties", lambda device: H100)
    assert get("cuda").preferred(on_gpu())


@FORMATS
def test_a_prepared_kernel_gives_the_problems_format(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "properties", lambda device: A100)
    case = Case(20, 24, format=format)
    x, parameters = case.tensors()
    asked = problem_of("stem", x.shape, F16, CPU, (CONV,), pool=POOL, memory_format=format)

    def stem_fwd(x: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
        strips.append(rows)
        return stem_packed(asked, x, weight, bias, A100, rows).y

    library = torch.library.Library("resnet_fused_cuda", "IMPL")
    library.impl("stem_fwd", stem_fwd, "CPU")
    strips: list[int] = []
    y = get("cuda").prepare(asked, parameters)(x, None)
    for plan in get("cuda").plans(asked):
        assert torch.equal(get("cuda").prepare(asked, parameters, plan)(x, None), y)
    library._destroy()
    assert strips == [0, 1, 2, 3, 5]
    assert y.is_contiguous(memory_format=format)
    assert_as_good_as_stock(y, stock(x, parameters), stock(x.double(), parameters.to(torch.float64)))
    assert plan_problem(asked) == [1, 20, 24, 64, 0]
