"""conv2d_bn, conv2d_bn_relu and conv2d_bn_add_relu on every backend of this machine, against float64 and stock."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.conv_cases import CASES, Case
from support.problems import problem_of
from support.refusals import MAY_BE_REFUSED_WHEN_TRIED, Asked, Machine, refusal
from support.tolerances import assert_as_good_as_stock
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import BackendError, Conv, get

F = torch.nn.functional
BACKENDS = ["auto", *rf.available_backends()]


def stock(op: str, x, weight, bias, residual, geometry):
    """What stock PyTorch computes, op by op."""
    y = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        y = y + residual
    return y if op == "conv2d_bn" else y.relu()


def run(op: str, x, weight, bias, residual, geometry):
    function = getattr(rf.functional, op)
    return function(x, weight, bias, *(() if residual is None else (residual,)), *geometry)


@pytest.mark.parametrize("op", ["conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@torch.no_grad()
def test_every_backend_is_as_good_as_stock(case: Case, op: str):
    x, weight, bias = case.tensors()
    shape = F.conv2d(x.float(), weight.float(), None, *case.geometry).shape
    residual = torch.randn(shape).to(case.dtype) if op == "conv2d_bn_add_relu" else None
    given = [t.clone() for t in (x, weight, bias)]
    want = stock(op, x.contiguous() if case.stock_fails else x, weight, bias, residual, case.geometry)
    exact = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    truth = stock(op, *exact, case.geometry)
    channels_last = case.stock_fails or want.is_contiguous(memory_format=torch.channels_last)
    asked = Asked(case.id, op, case.dtype, 0 in x.shape, case.groups, case.stock_fails, channels_last)
    for backend in BACKENDS:
        refused = refusal(backend, asked, Machine.here(x.device.type))
        try:
            with rf.use_backend(backend):
                y = run(op, x, weight, bias, residual, case.geometry)
        except BackendError as reason:
            assert refused is not None or backend in MAY_BE_REFUSED_WHEN_TRIED, f"{backend} refuses what it served: {reason}"
            assert refused is None or refused in str(reason)
            continue
        assert refused is None, f"{backend} serves what it refused"
        assert_as_good_as_stock(y, want, truth)
        assert y.is_contiguous() == want.is_contiguous() or case.stock_fails
        assert y.data_ptr() not in (x.data_ptr(), 0 if residual is None else residual.data_ptr()) or y.numel() == 0
    for before, after in zip(given, (x, weight, bias), strict=True):
        assert torch.equal(before, after) or before.isnan().any(), "an input was modified"


def test_residual_may_be_the_input_itself():
    case = Case("", out_channels=16)
    x, weight, bias = case.tensors()
    before = x.clone()
    y = rf.functional.conv2d_bn_add_relu(x, weight, bias, x, *case.geometry)
    truth = stock("", x.double(), weight.double(), bias.double(), x.double(), case.geometry)
    assert_as_good_as_stock(y, stock("", x, weight, bias, x, case.geometry), truth)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_made_by_an_overflow_in_the_middle_survives(backend: str):
    """Finite inputs whose products overflow to Inf − Inf: stock gives NaN, and a max(y, 0) would make it 0."""
    x = torch.full((1, 32, 8, 8), 3e38).contiguous(memory_format=torch.channels_last)
    if x.is_cuda and backend in ("cpu", "onednn"):
        pytest.skip("this backend serves CPU tensors; run it without --device")
    weight = torch.ones(32, 32, 1, 1)
    weight[:, ::2] = -1
    weight[:, :2] *= 4
    want = F.conv2d(x, weight).relu()
    with rf.use_backend(backend):
        y = rf.functional.conv2d_bn_relu(x, weight, torch.zeros(32))
    # Where the sums overflow depends on their order, so NaN and Inf count as one: not a number of this range.
    assert torch.equal(y.isfinite(), want.isfinite())


@pytest.mark.cpu
@pytest.mark.parametrize("precision", ["fast", "direct"])
def test_a_nan_written_where_no_counter_sees_it_survives(precision: str):
    """Numpy's memory, and `.data`, change without a trace on the tensor: nothing may be remembered of its values."""
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
    model = rf.fuse(nn.Sequential(*layers).eval(), precision=precision)
    array = np.zeros((1, 64, 64, 3), np.float32)
    x = torch.from_numpy(array).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert model(x).isfinite().all()
        array[:] = np.nan
        assert model(x).isnan().all()
        x.data.fill_(1)
        assert model(x).isfinite().all()
        x.data.fill_(math.nan)
        assert model(x).isnan().all()


def test_a_nan_written_into_a_result_survives():
    weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), rf.use_backend("onednn" if x.device.type == "cpu" else "auto"):
            y = rf.functional.conv2d_bn_relu(x, weight, bias, padding=1)
            y.data[0, 0, 0, 0] = float("nan")
            assert rf.functional.conv2d_bn_relu(y, weight, bias, padding=1).isnan().sum() == 4 * 8


@pytest.mark.cpu
def test_an_image_without_pixels_is_refused_as_by_stock():
    """Its padding alone would give a result."""
    x, weight, bias = torch.ones(2, 4, 5, 0), torch.ones(8, 4, 3, 3), torch.ones(8)
    with pytest.raises(RuntimeError, match="Only zero batch or zero channel") as stocks:
        F.conv2d(x, weight, bias, 1, 2)
    with pytest.raises(RuntimeError, match="Only zero batch or zero channel") as ours:
        rf.functional.conv2d_bn(x, weight, bias, padding=2)
    assert str(ours.value) == str(stocks.value)
    for backend in BACKENDS[1:-1]:
        with rf.use_backend(backend), pytest.raises(BackendError, match="the input or the result is empty"):
            rf.functional.conv2d_bn(x, weight, bias, padding=2)


@pytest.mark.parametrize(
    "shape, conv, faster",
    [
        ((1, 64, 4, 4), Conv(64, 64, (3, 3), padding=(1, 1)), False),
        ((1, 64, 7, 7), Conv(64, 64, (3, 3), padding=(1, 1)), True),
        ((2, 64, 4, 4), Conv(64, 64, (3, 3), padding=(1, 1)), True),
        ((1, 64, 4, 4), Conv(64, 64, (3, 3), padding=(1, 1), groups=4), True),
        ((1, 4, 16, 16), Conv(4, 8, (5, 5)), True),
    ],
    ids=["one-small-image", "more-pixels", "two-images", "groups", "large-filter"],
)
def test_onednn_wins_except_where_stock_does_without(shape, conv, faster):
    problem = problem_of("conv2d_bn_relu", shape, torch.float32, torch.device("cpu"), (conv,), precision="direct")
    assert get("onednn").preferred(problem) == faster


GRAD_CASES = [
    Case("3x3", x=(2, 4, 5, 5), out_channels=6),
    Case("stride-groups-dilation", x=(1, 4, 7, 7), out_channels=6, stride=(2, 2), dilation=(2, 2), padding=(2, 2), groups=2),
    Case("1x1", x=(2, 4, 3, 3), out_channels=3, kernel=(1, 1), padding=(0, 0)),
]


@pytest.mark.parametrize("op", ["conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu"])
@pytest.mark.parametrize("case", GRAD_CASES, ids=lambda case: case.id)
def test_derivatives(case: Case, op: str):
    tensors = [t.double().requires_grad_() for t in case.tensors()]
    residual = F.conv2d(*tensors, *case.geometry).detach().mul(0.5).requires_grad_() if "add" in op else None
    arguments = [*tensors, *([] if residual is None else [residual])]

    def function(x, weight, bias, residual=None):
        return run(op, x, weight, bias, residual, case.geometry)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_only_what_requires_a_gradient_gets_one():
    x, weight, bias = Case("").tensors()
    weight.requires_grad_()
    rf.functional.conv2d_bn_relu(x, weight, bias, padding=1).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_weight_changed_in_place_is_packed_anew():
    x, weight, bias = Case("").tensors()
    for _ in range(2):
        with torch.no_grad():
            y = rf.functional.conv2d_bn(x, weight, bias, padding=1)
            assert_as_good_as_stock(
                y, F.conv2d(x, weight, bias, padding=1), F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            )
            weight.mul_(-2)


BAD_INPUTS = {
    "x-without-batch": (lambda x, w, s: rf.functional.conv2d_bn(x[0], w, s), r"x has shape \(16, 9, 9\).*unsqueeze"),
    "wrong-channels": (lambda x, w, s: rf.functional.conv2d_bn(x[:, :8], w, s), "x has 8 channels.*takes 16"),
    "mixed-dtypes": (lambda x, w, s: rf.functional.conv2d_bn(x.bfloat16(), w, s), "x has dtype torch.bfloat16.*autocast"),
    "integers": (
        lambda x, w, s: rf.functional.conv2d_bn(x.long(), w, s),
        r"x has dtype torch.int64 .*the same. Cast the input: x.to\(torch.float32\).$",
    ),
    "bias-too-short": (lambda x, w, s: rf.functional.conv2d_bn(x, w, s[:5]), r"bias is \(5,\).*fold_bn"),
    "stride-0": (lambda x, w, s: rf.functional.conv2d_bn(x, w, s, stride=0), "stride is 0.*at least 1"),
    "padding-string": (lambda x, w, s: rf.functional.conv2d_bn(x, w, s, padding="same"), "padding is 'same'.*integer"),
    "groups-5": (lambda x, w, s: rf.functional.conv2d_bn(x, w, s, groups=5), "groups is 5.*divisor of the 24"),
    "image-too-small": (lambda x, w, s: rf.functional.conv2d_bn(x[..., :1, :1], w, s), "1×1 pixels.*larger image"),
    "residual-shape": (
        lambda x, w, s: rf.functional.conv2d_bn_add_relu(x, w, s, x, padding=1),
        "residual has shape.*result's shape",
    ),
    "add-shapes": (lambda x, w, s: rf.functional.add_relu(x, x[:1]), "residual is.*must be as x"),
}


@pytest.mark.parametrize("call, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_errors_name_argument_value_rule_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(*Case("").tensors())


@pytest.mark.cpu
def test_onednn_layout_runs_on_stock_ops():
    x, weight, bias = Case("").tensors()
    residual = torch.randn(2, 24, 9, 9)
    given = x.to_mkldnn()
    y = rf.functional.conv2d_bn_add_relu(given, weight, bias, residual.to_mkldnn(), padding=1)
    want = (F.conv2d(given, weight, bias, padding=1) + residual.to_mkldnn()).relu()
    assert torch.equal(y.to_dense(), want.to_dense())
    assert torch.equal(rf.functional.add_relu(given, given).to_dense(), (given + given).relu().to_dense())
    for call in (lambda: rf.functional.conv2d_bn(given, weight, bias), lambda: rf.functional.add_relu(given, given)):
        with rf.use_backend("onednn"), pytest.raises(BackendError, match=r"can't serve tensors of layout.*x\.to_dense\(\)"):
            call()


@pytest.mark.cpu
def test_explicit_backend_that_cannot_serve_raises_with_the_reason():
    x, weight, bias = Case("", dtype=torch.float64).tensors()
    with (
        rf.use_backend("onednn"),
        pytest.raises(BackendError, match="it serves float32, bfloat16 and float16, not torch.float64"),
    ):
        rf.functional.conv2d_bn(x, weight, bias, padding=1)
