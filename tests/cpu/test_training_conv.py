"""resnet_fused_cpu::training_conv and input_gradient on each instruction set, against float64 and stock PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused.backends.cpu import training_conv
from resnet_fused.fusion.batch_norm import conv2d

CL = torch.channels_last


class Case(NamedTuple):
    n: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    pad: int
    plan: tuple[int, ...] = ()
    groups: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, float32 weights that are values of `dtype`, dy."""
        x = torch.randn(self[:4])
        inside = self.in_channels // self.groups
        weight = torch.randn(self.out_channels, inside, self.kernel, self.kernel)
        weight = (weight * (inside * self.kernel**2) ** -0.5).to(dtype).float()
        dy = torch.randn_like(F.conv2d(x, weight, None, self.stride, self.pad, groups=self.groups))
        return tuple(t.contiguous(memory_format=CL) for t in (x.to(dtype), weight, dy.to(dtype)))

    def stock(self, x: Tensor, weight: Tensor, dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, weight, dy = (t.to(dtype) for t in (x, weight, dy))
        x.requires_grad_()
        y = F.conv2d(x, weight, None, self.stride, self.pad, groups=self.groups)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]


WINOGRAD = (4, 14, 8, 64, 0)
CASES = {
    "1x1": Case(2, 64, 9, 9, 96, 1, 1, 0),
    "1x1, channel tails": Case(1, 22, 7, 9, 34, 1, 1, 0),
    "1x1, one pixel": Case(1, 2, 1, 1, 2, 1, 1, 0),
    "1x1, wide": Case(1, 1024, 4, 5, 36, 1, 1, 0),
    "1x1, stride 2": Case(2, 64, 15, 13, 64, 1, 2, 0),
    "1x1, stride 2, even size, tails": Case(3, 38, 8, 10, 70, 1, 2, 0),
    "1x1, stride 3": Case(1, 32, 11, 10, 16, 1, 3, 0),
    "3x3": Case(2, 40, 8, 9, 48, 3, 1, 1),
    "3x3, no padding": Case(2, 16, 8, 9, 32, 3, 1, 0),
    "3x3, stride 2": Case(2, 70, 15, 14, 48, 3, 2, 1),
    "3x3, stride 2, wide": Case(4, 130, 10, 10, 66, 3, 2, 1),
    "3x3, stride 2, many pixels": Case(5, 32, 41, 40, 34, 3, 2, 1),
    "3x3, stride 2, one pixel": Case(1, 4, 1, 1, 4, 3, 2, 1),
    "3x3, few pixels of many images": Case(9, 130, 5, 5, 70, 3, 1, 1),
    "3x3, stride 2, few pixels of many images": Case(9, 134, 9, 10, 70, 3, 2, 1),
    "3x3, stride 4": Case(2, 8, 13, 12, 10, 3, 4, 1),
    "5x5, stride 3, padding 2": Case(2, 34, 9, 11, 18, 5, 3, 2),
    "3x3, Winograd": Case(2, 64, 8, 9, 96, 3, 1, 1, WINOGRAD),
    "3x3, Winograd, tails, by panels": Case(2, 67, 10, 11, 33, 3, 1, 1, (4, 14, 1, 64, 1)),
}


GROUPED = {
    "depthwise": Case(2, 34, 9, 11, 34, 3, 1, 1, groups=34),
    "depthwise 5x5, padding 1": Case(2, 16, 9, 11, 16, 5, 1, 1, groups=16),
    "depthwise, stride 2": Case(2, 34, 9, 11, 34, 3, 2, 1, groups=34),
    "4 channels a group": Case(3, 36, 8, 7, 36, 3, 1, 1, groups=9),
    "24 channels a group": Case(2, 72, 10, 9, 72, 3, 1, 1, groups=3),
    "24 channels a group, stride 2": Case(2, 72, 10, 9, 72, 3, 2, 1, groups=3),
    "more outputs than inputs": Case(1, 16, 6, 5, 32, 3, 1, 1, groups=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GROUPED.values(), ids=[*GROUPED])
def test_grouped(isa: str, case: Case, dtype: torch.dtype):
    tensors = x, weight, dy = case.tensors(dtype)
    y = training_conv._grouped(case.groups, case.stride, case.pad, x, weight)
    results = zip(case.stock(*tensors, dtype), case.stock(*tensors, torch.float64), strict=True)
    own = [y]
    if case.stride == 1:
        own.append(training_conv._gradient_of_groups(case.groups, case.pad, dy, weight, (case.height, case.width)))
    for got, (stock, truth) in zip(own, results, strict=False):
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=CL)
        assert_as_good_as_stock(got, stock, truth)


def test_groups_of_a_network_are_ours_where_they_were_measured_to_be_faster(monkeypatch):
    """As the modules call them, with gradients of all, and the second one."""
    called = []
    grouped = training_conv._grouped
    monkeypatch.setattr(training_conv, "_grouped", lambda *args: called.append(args[:3]) or grouped(*args))
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, groups=16, bias=False).to(memory_format=CL)
    x = torch.randn(2, 64, 10, 9).contiguous(memory_format=CL).requires_grad_()
    found = []
    for forward in (lambda: conv2d(conv, x), lambda: conv(x)):
        y = forward()
        gradients = torch.autograd.grad(y.square().sum(), (x, conv.weight), create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].square().sum(), conv.weight)
        found.append((y, *gradients, second))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.stride() == want.stride()
    with torch.no_grad():
        torch.testing.assert_close(conv2d(conv, x), conv(x), rtol=1e-5, atol=1e-5)
    assert called == [(16, 1, 1)] * len(called)
    assert len(called) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])
def test_result_and_gradient_of_x(isa: str, case: Case, dtype: torch.dtype):
    ops = torch.ops.resnet_fused_cpu
    x, weight, dy = case.tensors(dtype)
    if dtype == torch.bfloat16 and not case.plan and not ops.avx512_bf16():
        with pytest.raises(ValueError, match="need a CPU with AVX512_BF16"):
            ops.training_conv(x, weight, case.stride, case.pad, case.plan)
        with pytest.raises(ValueError, match="need a CPU with AVX512_BF16"):
            ops.input_gradient(dy, weight, case.height, case.width, case.stride, case.pad, case.plan)
        return
    y = ops.training_conv(x, weight, case.stride, case.pad, case.plan)
    dx = ops.input_gradient(dy, weight, case.height, case.width, case.stride, case.pad, case.plan)
    assert dx.shape == x.shape
    tensors = (x, weight, dy)
    for each in zip((y, dx), case.stock(*tensors, dtype), case.stock(*tensors, torch.float64), strict=True):
        assert each[0].dtype == dtype
        assert each[0].is_contiguous(memory_format=CL)
        assert_as_good_as_stock(*each)
    # Weights that were rounded before are packed to the same.
    assert torch.equal(y, ops.training_conv(x, weight.to(dtype), case.stride, case.pad, case.plan))
    assert torch.equal(dx, ops.input_gradient(dy, weight.to(dtype), case.height, case.width, case.stride, case.pad, case.plan))


def test_float32_weights_are_rounded_like_stock_s(isa: str):
    ops = torch.ops.resnet_fused_cpu
    x, _, dy = CASES["3x3, Winograd"].tensors(torch.bfloat16)
    weight = torch.randn(96, 64, 3, 3).contiguous(memory_format=CL)
    rounded = weight.bfloat16()
    assert torch.equal(ops.training_conv(x, weight, 1, 1, WINOGRAD), ops.training_conv(x, rounded, 1, 1, WINOGRAD))
    assert torch.equal(
        ops.input_gradient(dy, weight, 8, 9, 1, 1, WINOGRAD), ops.input_gradient(dy, rounded, 8, 9, 1, 1, WINOGRAD)
    )


def test_empty_batch(isa: str):
    ops = torch.ops.resnet_fused_cpu
    x, weight, dy = CASES["3x3, stride 2"].tensors(torch.float32)
    assert ops.training_conv(x[:0], weight, 2, 1, []).shape == (0, 48, 8, 7)
    assert ops.input_gradient(dy[:0], weight, 15, 14, 2, 1, []).shape == (0, 70, 15, 14)


def test_nan_stays_in_its_window(isa: str):
    """In the gradient by phases, as in stock's."""
    case = CASES["3x3, stride 2"]
    x, weight, dy = case.tensors(torch.float32)
    dy[0, 3, 2, 2] = torch.nan
    dx = torch.ops.resnet_fused_cpu.input_gradient(dy, weight, case.height, case.width, case.stride, case.pad, [])
    assert torch.equal(dx.isnan(), case.stock(x, weight, dy, torch.float32)[1].isnan())


def test_wrong_arguments_are_named(isa: str):
    ops = torch.ops.resnet_fused_cpu
    x, weight, dy = CASES["3x3, stride 2"].tensors(torch.float32)
    wrong = {
        "weight is not channels_last": (x, weight.contiguous(), 2, 1, []),
        "weight must be float32, bfloat16 or float16": (x, weight.double(), 2, 1, []),
        "weight is bfloat16 where x is float32": (x, weight.bfloat16(), 2, 1, []),
        "x has 70 channels, where weight asks for 6": (x, weight[:, :6].contiguous(memory_format=CL), 2, 1, []),
        "it must be square": (x, weight[..., :1].contiguous(memory_format=CL), 2, 1, []),
        "stride is 0": (x, weight, 0, 1, []),
        "and pad 3": (x, weight, 2, 3, []),
        "x is not channels_last": (x.contiguous(), weight, 2, 1, []),
        "smaller than the kernel": (x[:, :, :2, :2].contiguous(memory_format=CL), weight, 2, 0, []),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            ops.training_conv(*arguments)
    with pytest.raises(ValueError, match="size of the result"):
        ops.input_gradient(dy, weight, 17, 14, 2, 1, [])
    with pytest.raises(ValueError, match="plan is for stride 1"):
        ops.input_gradient(dy, weight, 15, 14, 2, 1, WINOGRAD)
    with pytest.raises(ValueError, match="dy has 48 channels, where weight asks for 40"):
        ops.input_gradient(dy, weight[:40].contiguous(memory_format=CL), 15, 14, 2, 1, [])
    if ops.avx512_bf16():
        odd = torch.randn(2, 33, 6, 6).bfloat16().contiguous(memory_format=CL)
        with pytest.raises(ValueError, match="even number of input channels"):
            ops.training_conv(odd, torch.randn(64, 33, 1, 1), 1, 0, [])
