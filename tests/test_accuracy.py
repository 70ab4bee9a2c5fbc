"""The one judge of results: what is just right and just wrong by each rule, and that everybody asks it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.problems import problem_of
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends import Conv, accuracy
from resnet_fused.backends.accuracy import ProblemCheck, judge, parameters_of
from resnet_fused.bench import inference, variants
from resnet_fused.bench.workloads import Workload
from resnet_fused.fusion import installing
from resnet_fused.runtime import run
from resnet_fused.verification import cases, device

pytestmark = pytest.mark.cpu

NAN, INF = torch.nan, torch.inf
TRUTH = torch.linspace(1, 2, 64, dtype=torch.float64)
CPU = torch.device("cpu")


def with_error(share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The truth with a relative error of that share of what is allowed where stock is exact."""
    return (TRUTH * (1 + share * accuracy.tolerance.FLOOR[dtype])).to(dtype)


@pytest.mark.parametrize(("share", "right"), [(0.9, True), (-0.9, True), (1.2, False), (-1.2, False)])
def test_an_error_up_to_the_floor_is_allowed(share: float, right: bool) -> None:
    assert (judge(with_error(share), TRUTH.float(), TRUTH).fault is None) == right


@pytest.mark.parametrize(("times", "right"), [(1.9, True), (2.1, False)])
def test_an_error_of_twice_stocks_is_allowed(times: float, right: bool) -> None:
    stock = with_error(100)
    assert (judge(with_error(100 * times), stock, TRUTH).fault is None) == right


@pytest.mark.parametrize(
    ("ours", "stock", "truth", "fault"),
    [
        pytest.param(1.0, NAN, NAN, "disappears", id="nan-disappears"),
        pytest.param(1.0, INF, INF, "disappears", id="inf-disappears"),
        pytest.param(1.0, NAN, 1.0, None, id="stock-spreads-a-nan"),
        pytest.param(NAN, NAN, 1.0, None, id="as-stock-spreads-it"),
        pytest.param(NAN, 1.0, NAN, None, id="stock-loses-a-nan"),
        pytest.param(NAN, 1.0, 1.0, "appears", id="nan-appears"),
        pytest.param(INF, 1.0, 1.0, "appears", id="inf-appears"),
        pytest.param(NAN, INF, INF, "appears", id="inf-becomes-nan"),
        pytest.param(INF, INF, INF, None, id="inf-stays"),
    ],
)
def test_nan_and_inf(ours: float, stock: float, truth: float, fault: str | None) -> None:
    results = [TRUTH.float(), TRUTH.float(), TRUTH.clone()]
    for result, value in zip(results, (ours, stock, truth), strict=True):
        result[7] = value
    found = judge(*results).fault
    assert found is None if fault is None else fault in found


def test_shape_and_dtype_are_stocks() -> None:
    assert "of shape" in judge(TRUTH[:3].float(), TRUTH.float(), TRUTH).fault
    assert "bfloat16" in judge(TRUTH.bfloat16(), TRUTH.float(), TRUTH).fault


def test_without_a_truth_the_errors_of_both_are_allowed() -> None:
    assert judge(with_error(2.9), TRUTH.float(), None).fault is None
    assert judge(with_error(3.2), TRUTH.float(), None).fault is not None


# ---- everybody asks it --------------------------------------------------------------------------------------------------


def lost_digits(y: Tensor) -> Tensor:
    """As a kernel gives it whose sums are in bfloat16."""
    return y.bfloat16().to(y.dtype)


def unwritten(y: Tensor) -> Tensor:
    y = y.clone()
    y[(-1,) * y.dim()] = NAN
    return y


FAULTS = {"lost-digits": (lost_digits, "relative error"), "unwritten": (unwritten, "a NaN or Inf appears")}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> tuple[object, str]:
    return FAULTS[request.param]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


@pytest.fixture
def spoilt_programs(fault, monkeypatch: pytest.MonkeyPatch) -> str:
    """What fused models give is spoilt; gives the judge's words for it."""
    spoil, words = fault
    call = run.Run.__call__
    monkeypatch.setattr(run.Run, "__call__", lambda self, inputs: spoil(call(self, inputs)))
    settle = installing.FastPath.choose_run
    spoilt = lambda self, *args: (lambda made, y: (made, spoil(y)))(*settle(self, *args))  # noqa: E731
    monkeypatch.setattr(installing.FastPath, "choose_run", spoilt)
    return words


def test_fuse_asks_it(spoilt_programs: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Net().eval()
    assert rf.fuse(model, example_inputs=torch.randn(2, 8, 6, 6)) is model
    assert spoilt_programs in caplog.text


def test_verify_asks_it(spoilt_programs: str) -> None:
    model = Net().eval()
    assert not rf.verify(model, rf.fuse(model), torch.randn(2, 8, 6, 6)).passed
    assert rf.verify(model, copy.deepcopy(model), torch.randn(2, 8, 6, 6)).passed


def test_trials_and_tuning_ask_it(fault) -> None:
    spoil, words = fault
    problem = problem_of("conv2d_bn_relu", (2, 8, 6, 6), torch.float32, CPU, (Conv(8, 16, (3, 3)),))
    kernel = rf.backends.stock().prepare(problem, parameters_of(problem))
    check = ProblemCheck(problem, parameters_of(problem))
    assert check.fault(kernel) is None
    assert words in check.fault(lambda x, residual: spoil(kernel(x, residual)))


def test_verification_of_a_device_asks_it(fault) -> None:
    spoil, words = fault
    case = next(made for _, every in cases.trials("onednn", CPU, (torch.float32,)) for made in every)
    assert device.check_trial(case).passed
    assert words in device.check_trial(case._replace(compute=lambda: spoil(case.compute()))).reason


def test_the_benchmarks_ask_it(fault) -> None:
    spoil, words = fault
    workload = Workload("resnet18", 1, "float32", (32, 32))
    result = inference.Result(variants.OURS)
    truth, stock = TRUTH[None], TRUTH.float()[None]
    result.error = accuracy.relative_error(stock, truth)
    assert not inference.is_wrong(result, workload, stock, stock, truth, stock)
    ours = spoil(stock)
    result.error = accuracy.relative_error(ours, truth)
    assert inference.is_wrong(result, workload, ours, stock, truth, stock)
    assert words in result.note


def test_a_model_is_measured_by_the_memory_format_in_which_stock_has_the_larger_error() -> None:
    workload = Workload("resnet18", 1, "float32", (32, 32))
    truth = torch.randn(1000, dtype=torch.float64)
    near, far, ours = (truth * (1 + scale * torch.randn(1000, dtype=torch.float64)) for scale in (2e-6, 8e-6, 1e-5))
    result = inference.Result(variants.OURS, error=1e-5)
    stock, other, y = ([t.float()] for t in (near, far, ours))
    assert inference.is_wrong(result, workload, y, stock, [truth], stock)
    assert not inference.is_wrong(result, workload, y, stock, [truth], other)
