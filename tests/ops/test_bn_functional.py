"""rf.functional.bn, bn_relu and bn_add_relu: what F.batch_norm does, running statistics and errors included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import FLOOR, assert_as_good_as_stock, relative_error

import resnet_fused as rf
from resnet_fused.backends import BackendError

OPS = ["bn", "bn_relu", "bn_add_relu"]
CL = torch.channels_last


def stock(op, x, residual, *args, **kwargs):
    y = F.batch_norm(x, *args, **kwargs)
    y = y + residual if op == "bn_add_relu" else y
    return y if op == "bn" else y.relu()


def ours(op, x, residual, *args, **kwargs):
    return getattr(rf.functional, op)(x, *((residual,) if op == "bn_add_relu" else ()), *args, **kwargs)


def tensors(dtype=torch.float32):
    """x, residual, running mean and variance, weight, bias."""
    x, residual = (torch.randn(3, 16, 5, 6).to(dtype).contiguous(memory_format=CL) for _ in range(2))
    return x, residual, torch.randn(16), torch.rand(16) + 0.5, torch.randn(16), torch.randn(16)


# dtypes and layouts that the compiled kernels serve, and some that only stock does
INPUTS = {
    "channels_last": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "strided": lambda x: x[:, :, ::2],
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "empty": lambda x: x[:0],
    "onednn": lambda x: x.to_mkldnn() if x.device.type == "cpu" else x,
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("convert", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("op", OPS)
def test_results_and_running_statistics_are_stocks(op, convert, training):
    x, residual, *vectors = tensors()
    x, residual = convert(x), convert(residual)
    if x.is_meta:
        vectors = [v.to("meta") for v in vectors]
    mine, theirs = ([v.clone() for v in vectors] for _ in range(2))
    settings = {"training": training, "momentum": 0.3, "eps": 1e-3}
    y = ours(op, x, residual, *mine, **settings)
    want = stock(op, x, residual, *theirs, **settings)
    assert (y.shape, y.dtype, y.layout) == (want.shape, want.dtype, want.layout)
    if x.is_meta or x.numel() == 0:
        return
    if x.layout is torch.strided:
        assert y.is_contiguous(memory_format=CL) == want.is_contiguous(memory_format=CL)
    dense = [t.to_dense() if t.layout is not torch.strided else t for t in (x, residual, y, want)]
    truth = stock(op, *(t.double() for t in (*dense[:2], *vectors)), **settings)
    assert_as_good_as_stock(dense[2], dense[3], truth)
    for a, b, before in zip(mine[:2], theirs[:2], vectors[:2], strict=True):
        assert relative_error(a, b.double()) < FLOOR[x.dtype]
        assert torch.equal(a, before) == (not training)


@pytest.mark.parametrize("op", OPS)
def test_without_parameters_and_running_statistics_and_compiled(op):
    x, residual, mean, var, _, _ = tensors()
    torch.testing.assert_close(
        ours(op, x, residual, None, None, training=True), stock(op, x, residual, None, None, training=True)
    )

    def call(x, residual, mean, var):
        return ours(op, x, residual, mean, var, training=True)

    given = [mean.clone(), var.clone()]
    got = torch.compile(call, fullgraph=True, backend="eager")(x, residual, *given)
    torch.testing.assert_close(got, stock(op, x, residual, mean, var, training=True))
    for a, b in zip(given, (mean, var), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cpu
@pytest.mark.skipif("cpu" not in rf.available_backends(), reason="the compiled CPU kernels aren't built; pip install -e .")
@pytest.mark.parametrize("op", OPS)
def test_gradients_come_from_the_op(op):
    grads = []
    for call in (ours, stock):
        torch.manual_seed(1)
        x, residual, mean, var, weight, bias = tensors()
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        y = call(op, x, residual, mean, var, weight, bias, training=True)
        if call is ours:
            assert op in y.grad_fn.name()
        y.square().sum().backward()
        grads.append([t.grad for t in leaves])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_vmap_runs_stock_ops():
    x, _, mean, var, weight, bias = tensors()
    got = torch.vmap(lambda x: rf.functional.bn_relu(x, mean, var, weight, bias))(x.unsqueeze(1))
    torch.testing.assert_close(got[:, 0], F.batch_norm(x, mean, var, weight, bias).relu())


BAD_INPUTS = {
    "three-dimensions": (lambda f, x, m, v: f.bn(x[0], m, v), r"x has shape \(16, 5, 6\).*unsqueeze"),
    "short-weight": (lambda f, x, m, v: f.bn(x, m, v, m[:3]), r"weight is \(3,\) on .*; it must be \(16,\)"),
    "no-statistics": (lambda f, x, m, v: f.bn_relu(x, m, None), "running_var is None.*training=True"),
    "other-device": (lambda f, x, m, v: f.bn_relu(x, m.to("meta"), v), "running_mean is .* on meta"),
    "one-value": (lambda f, x, m, v: f.bn(x[:1, :, :1, :1], m, v, training=True), "one value per channel.*larger batch"),
    "residual": (lambda f, x, m, v: f.bn_add_relu(x, x[:1], m, v), "residual is.*must be as x"),
}


@pytest.mark.parametrize("call, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_errors_name_argument_value_rule_and_remedy(call, message):
    x, _, mean, var, _, _ = tensors()
    with pytest.raises(ValueError, match=message):
        call(rf.functional, x, mean, var)


def test_an_explicit_backend_that_cannot_serve_raises():
    x, _, mean, var, _, _ = tensors()
    with rf.use_backend("onednn"), pytest.raises(BackendError, match="onednn"):
        rf.functional.bn(x, mean, var)
