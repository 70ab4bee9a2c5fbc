"""conv2d: the training convolution on the CPU kernels, forward and gradient of x by Winograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as_stock

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.ops.conv2d import served

pytestmark = pytest.mark.skipif(
    "cpu" not in rf.available_backends(), reason="the compiled CPU kernels aren't built; pip install -e ."
)
CL, NCHW = torch.channels_last, torch.contiguous_format
ONES = ((1, 1), (1, 1), (1, 1), 1)

CASES = {
    "square": ((3, 64, 20, 20), 64, CL),
    "odd-sizes-and-channels": ((2, 67, 33, 31), 70, CL),
    "contiguous": ((3, 64, 20, 20), 64, NCHW),
}


def leaves(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape, channels, format = CASES[name]
    x = torch.randn(shape).contiguous(memory_format=format)
    weight = (torch.randn(channels, shape[1], 3, 3) * 0.05).contiguous(memory_format=format)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str):
    x, weight = leaves(name)
    assert served(x, weight, *ONES)
    y, want = ops.conv2d(x, weight), F.conv2d(x, weight, padding=1)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = F.conv2d(*exact, padding=1)
    assert_as_good_as_stock(y.detach(), want.detach(), truth.detach())
    assert y.is_contiguous(memory_format=CL) == want.is_contiguous(memory_format=CL)
    dy = torch.randn_like(y)
    grads = [
        torch.autograd.grad(out, inputs, dy.to(out.dtype))
        for out, inputs in ((y, (x, weight)), (want, (x, weight)), (truth, exact))
    ]
    for each in zip(*grads, strict=True):
        assert_as_good_as_stock(*each)


def test_second_derivative_is_stock_s():
    x, weight = leaves("square")
    penalties = []
    for call in (ops.conv2d, lambda x, w: F.conv2d(x, w, padding=1)):
        (dx,) = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*penalties, rtol=1e-3, atol=1e-2)


def test_opcheck():
    torch.library.opcheck(torch.ops.resnet_fused.conv2d.default, leaves("square"))


def test_what_it_does_not_serve():
    """Few pixels or channels, where stock is faster, and whatever isn't a float32 3×3 convolution of stride 1."""
    x, weight = leaves("square")
    assert not served(x[:, :, :5, :5], weight, *ONES)
    assert not served(x[:, :32], weight[:, :32], *ONES)
    assert not served(x.bfloat16(), weight.bfloat16(), *ONES)
    assert not served(x.double(), weight.double(), *ONES)
    assert not served(x, weight, (2, 2), (1, 1), (1, 1), 1)
    assert not served(x, weight[:, :, :1, :1], *ONES)
    with rf.use_backend("reference"):
        assert not served(x, weight, *ONES)
