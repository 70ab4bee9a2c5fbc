"""rf.fuse(example_inputs=…): a fused model that is wrong isn't returned, and the log says what is wrong."""

from __future__ import annotations

import logging

import pytest
import torch
from support.kinds import Unit, check, ops, unit
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends.reference.backend import Reference
from resnet_fused.fusion.path import FastPath
from resnet_fused.fusion.rows import path_of
from resnet_fused.runtime import executor

X = torch.randn(2, 8, 6, 6)


def _kernels(change):
    """Makes the reference backend's kernels change their results."""

    def apply(patch):
        prepare = Reference.prepare

        def changed(self, problem, folded):
            kernel = prepare(self, problem, folded)
            return lambda x, residual: change(kernel(x, residual))

        patch.setattr(Reference, "prepare", changed)

    return apply


def _raises(patch):
    def key(self, args):
        raise ZeroDivisionError("by nothing")

    patch.setattr(FastPath, "kind_of", key)


def _one_nan(y: Tensor) -> Tensor:
    y = y.clone()
    y[0, 0, 0, 0] = float("nan")
    return y


def _one_value(y: Tensor) -> Tensor:
    y = y.clone()
    y[0, 1, 2, 3] += 0.5
    return y


def _other_strides(patch):
    _kernels(lambda y: y.contiguous(memory_format=torch.channels_last))(patch)
    patch.setattr(executor, "in_format", lambda y, format: y)


def _filled(change):
    fill = executor.fill
    return lambda patch: patch.setattr(executor, "fill", lambda template, get: change(fill(template, get)))


# what makes the fast path wrong, and what the log says
FAULTS = {
    "scaled": (_kernels(lambda y: y * 1.5), "relative error is"),
    "one-value": (_kernels(_one_value), "relative error is"),
    "NaN": (_kernels(_one_nan), "a NaN or Inf appears"),
    "zero": (_kernels(torch.zeros_like), "relative error is"),
    "shape": (_kernels(lambda y: y[..., 1:]), "shape (2, 8, 6, 5)"),
    "dtype": (_kernels(Tensor.double), "of torch.float64"),
    "strides": (_other_strides, "it gives strides"),
    "tuple": (_filled(lambda y: (y,)), "it gives TreeSpec"),
    "dict": (_filled(lambda y: {"out": y}), "it gives TreeSpec"),
    "none": (_filled(lambda y: None), "it gives NoneType and stock Tensor"),
    "exception": (_raises, "it raises ZeroDivisionError: by nothing"),
}


def _attributes(model: nn.Module) -> list[dict[str, object]]:
    """What each module has, but the fast path that a block of the library's own keeps even where it isn't fused."""
    own = [vars(module) for module in model.modules()]
    return [{name: v for name, v in each.items() if v is not None and not isinstance(v, FastPath)} for each in own]


MODELS = {"sequential": lambda: nn.Sequential(*unit()), "module": Unit, "block": lambda: rf.BasicBlock(8, 8)}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_a_wrong_fast_path(fault, message, make, inplace, trained, monkeypatch, caplog):
    model = trained(make())
    before = _attributes(model)
    with torch.no_grad():
        want = model(X)
        fault(monkeypatch)
        result = rf.fuse(model, example_inputs=X, inplace=inplace, backend="reference")
    assert result is model
    assert _attributes(model) == before
    assert message in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)
    caplog.clear()
    fused = rf.fuse(model, example_inputs=X, inplace=inplace, backend="reference")
    assert (fused is model) == inplace
    assert path_of(fused) is not None
    assert all(ops(fused))
    assert not caplog.text


@pytest.mark.parametrize("arguments", [X, (X,), X.clone().requires_grad_()], ids=["tensor", "tuple", "with-gradient"])
def test_a_right_one_is_returned_fused(arguments, trained, caplog):
    model = trained(Unit())
    fused = rf.fuse(model, example_inputs=arguments)
    assert not caplog.text
    assert fused is not model
    check(fused, model, X)


def test_example_inputs_that_stock_refuses_raise_stocks_error(trained):
    model = trained(Unit())
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        rf.fuse(model, example_inputs=X[:, :5])


def test_the_example_leaves_inputs_parameters_and_random_numbers_as_they_are(trained):
    class Overwrites(Unit):
        def forward(self, x):
            x.mul_(2)
            return self.relu(self.bn(self.conv(x))) + torch.rand(1)

    model = trained(Overwrites())
    x, state = torch.ones(1, 8, 6, 6), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    fused = rf.fuse(model, example_inputs=x)
    assert fused is not model
    assert torch.equal(torch.rand(1), want)
    assert torch.equal(x, torch.ones_like(x))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_tune_is_not_done_for_a_wrong_one(trained, monkeypatch, caplog):
    from resnet_fused import tuning

    monkeypatch.setattr(tuning, "tune", lambda *args: pytest.fail("it was tuned"))
    _kernels(lambda y: y * 2)(monkeypatch)
    model = trained(Unit())
    assert rf.fuse(model, example_inputs=X, backend="reference", tune=True, cuda_graph=True) is model
    assert "relative error is" in caplog.text
