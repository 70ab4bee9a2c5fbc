"""add_relu forward and backward on the Triton kernels."""

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock

import resnet_fused as rf
from resnet_fused.backends.triton import elementwise

SHAPES = {
    "several-programs": (2, 64, 9, 9),
    "one-element": (1, 1, 1, 1),
    "no-whole-vector": (1, 7, 3, 5),
}
NAN = float("nan")


def tensors(shape, dtype, count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last) for _ in range(count)]


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_add_relu_is_as_exact_as_stock(shape, dtype):
    x, residual = tensors(shape, dtype, 2)
    y = rf.functional.add_relu(x, residual)
    assert_as_good_as_stock(y, F.relu(x + residual), F.relu(x.double() + residual.double()))
    assert y.stride() == x.stride()


def test_add_relu_takes_tensors_of_different_strides():
    x, residual = tensors((2, 16, 5, 5), torch.float32, 2)
    y = rf.functional.add_relu(x, residual.contiguous())
    assert torch.equal(y, F.relu(x + residual))


def test_add_relu_keeps_nan_and_inf():
    x = torch.tensor([1.0, NAN, float("inf"), -float("inf"), 2.0]).reshape(1, 5, 1, 1)
    residual = torch.tensor([NAN, 1.0, 1.0, float("inf"), -3.0]).reshape(1, 5, 1, 1)
    torch.testing.assert_close(rf.functional.add_relu(x, residual), F.relu(x + residual), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_add_relu_backward_is_that_of_stock(dtype):
    y, dy = tensors((2, 24, 5, 5), dtype, 2)
    y = y.relu()
    y[0, 0, 0, 0] = NAN
    dx = torch.empty_like(dy)
    elementwise.add_relu_bwd(dy.numel(), dtype).bind()(dy, y, dx)
    assert torch.equal(dx, torch.ops.aten.threshold_backward(dy, y, 0))


def test_add_relu_gradients_come_from_the_kernel(monkeypatch):
    launched = []
    launch = elementwise.add_relu_bwd
    monkeypatch.setattr(elementwise, "add_relu_bwd", lambda *args: launched.append(args) or launch(*args))
    inputs = [t.requires_grad_() for t in tensors((1, 6, 4, 3), torch.float32, 2)]
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    rf.functional.add_relu(*inputs).square().sum().backward()
    F.relu(copies[0] + copies[1]).square().sum().backward()
    assert len(launched) == 1
    for ours, stock in zip(inputs, copies, strict=True):
        assert torch.equal(ours.grad, stock.grad)
