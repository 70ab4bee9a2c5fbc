"""conv2d: the training convolution, whose products are shared between the CPU kernels and stock PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.ops.training_conv2d import beats_stock

pytestmark = pytest.mark.skipif(
    "cpu" not in rf.available_backends(), reason="the compiled CPU kernels aren't built; pip install -e ."
)
CL, NCHW = torch.channels_last, torch.contiguous_format

# shape of x, output channels, kernel, stride, padding, memory format
CASES = {
    "3x3": ((3, 64, 20, 20), 64, 3, 1, 1, CL),
    "3x3-odd-sizes-and-channels": ((2, 67, 33, 31), 70, 3, 1, 1, CL),
    "3x3-contiguous": ((3, 64, 20, 20), 64, 3, 1, 1, NCHW),
    "3x3-few-pixels": ((2, 64, 5, 5), 96, 3, 1, 1, CL),
    "3x3-stride-2": ((2, 64, 15, 14), 96, 3, 2, 1, CL),
    "3x3-stride-2-many-pixels": ((5, 64, 40, 41), 80, 3, 2, 1, CL),
    "3x3-stride-2-few-pixels": ((2, 64, 7, 6), 96, 3, 2, 1, CL),
    "1x1": ((2, 64, 9, 11), 128, 1, 1, 0, CL),
    "1x1-stride-2": ((2, 96, 9, 11), 65, 1, 2, 0, CL),
}


def leaves(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    shape, channels, kernel, stride, padding, format = CASES[name]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=format)
    weight = (torch.randn(channels, shape[1], kernel, kernel) * 0.05).contiguous(memory_format=format)
    return x.requires_grad_(), weight.requires_grad_(), stride, padding


def is_served(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> bool:
    return beats_stock(x, weight, (stride, stride), (padding, padding), (1, 1), 1)


def gradients(y: torch.Tensor, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy.to(y.dtype))


@pytest.mark.cpu
def test_values_and_gradients():
    for name in CASES:
        x, weight, stride, padding = leaves(name)
        assert is_served(x, weight, stride, padding)
        y, want = ops.conv2d(x, weight, stride, padding), F.conv2d(x, weight, None, stride, padding)
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = F.conv2d(*exact, None, stride, padding)
        assert_as_good_as_stock(y.detach(), want.detach(), truth.detach())
        assert y.is_contiguous(memory_format=CL) == want.is_contiguous(memory_format=CL)
        dy = torch.randn_like(y)
        ours = gradients(y, dy, x, weight)
        for each in zip(ours, gradients(want, dy, x, weight), gradients(truth, dy, *exact), strict=True):
            assert_as_good_as_stock(*each)
        assert ours[1].stride() == weight.stride()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_with_float32_weights(name: str):
    """As under autocast: weights are rounded on their way in, their gradient is not on its way out."""
    x, weight, stride, padding = leaves(name, torch.bfloat16)
    if not is_served(x, weight, stride, padding):
        pytest.skip("served in bfloat16 on CPUs with AVX512_BF16 and without AMX, where it pays")
    y = ops.conv2d(x, weight, stride, padding)
    rounded = weight.detach().bfloat16().requires_grad_()
    want = F.conv2d(x, rounded, None, stride, padding)
    exact = [t.detach().double().requires_grad_() for t in (x, rounded)]
    truth = F.conv2d(*exact, None, stride, padding)
    assert_as_good_as_stock(y.detach(), want.detach(), truth.detach())
    dy = torch.randn_like(y)
    dx, dweight = gradients(y, dy, x, weight)
    stock, right = gradients(want, dy, x, rounded), gradients(truth, dy, *exact)
    assert_as_good_as_stock(dx, stock[0], right[0])
    assert dweight.dtype == torch.float32
    assert_as_good_as_stock(dweight, stock[1].float(), right[1])


@pytest.mark.cpu
def test_only_what_is_needed():
    for name in ("3x3", "1x1"):
        x, weight, stride, padding = leaves(name)
        frozen = ops.conv2d(x, weight.detach(), stride, padding)
        first = ops.conv2d(x.detach(), weight, stride, padding)
        (dx,) = torch.autograd.grad(frozen.sum(), x)
        (dweight,) = torch.autograd.grad(first.sum(), weight)
        both = torch.autograd.grad(ops.conv2d(x, weight, stride, padding).sum(), (x, weight))
        assert torch.equal(dx, both[0])
        assert torch.equal(dweight, both[1])


@pytest.mark.parametrize("name", ["3x3", "3x3-stride-2", "1x1"])
def test_second_derivative_is_stock_s(name: str):
    x, weight, stride, padding = leaves(name)
    penalties = []
    for call in (ops.conv2d, lambda x, w, s, p: F.conv2d(x, w, None, s, p)):
        (dx,) = torch.autograd.grad(call(x, weight, stride, padding).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*penalties, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str):
    torch.library.opcheck(torch.ops.resnet_fused.conv2d.default, leaves(name))


@pytest.mark.cpu
def test_what_it_does_not_serve():
    """Few channels, where stock is faster, other dtypes, contiguous 1×1, and whatever isn't a plain 1×1 or 3×3 convolution."""
    x, weight, *_ = leaves("3x3")
    assert not is_served(x[:, :32], weight[:, :32], 1, 1)
    assert not is_served(x.double(), weight.double(), 1, 1)
    assert not is_served(x, weight.double(), 1, 1)
    assert not is_served(x, weight, 1, 0)
    assert not is_served(x, weight, 3, 1)
    assert not beats_stock(x, weight, (1, 2), (1, 1), (1, 1), 1)
    assert not beats_stock(x, weight, (1, 1), (1, 1), (2, 2), 1)
    groups = weight[:, :4].contiguous(memory_format=torch.channels_last)
    assert beats_stock(x, groups, (1, 1), (1, 1), (1, 1), 16)
    assert not beats_stock(x, torch.cat((groups, groups)), (1, 1), (1, 1), (1, 1), 16)
    assert not beats_stock(x.contiguous(), groups.contiguous(), (1, 1), (1, 1), (1, 1), 16)
    assert not is_served(x.contiguous(), weight[:, :, :1, :1].contiguous(), 1, 0)
    with rf.use_backend("reference"):
        assert not is_served(x, weight, 1, 1)
