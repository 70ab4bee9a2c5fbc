"""What the library tells of calls: the warning where most run as stock, the counts and the reason."""

from __future__ import annotations

import io

import pytest
import torch
from support.kinds import Unit, check, counts, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(1, 8, 6, 6)


class Branches(Unit):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if x.sum() > 0 else x


class Optional(Unit):
    def forward(self, x, scale=1.0):
        return self.relu(self.bn(self.conv(x))) * scale


# model, how it is called, the reason
STOCK = {
    "derivatives": (Unit, lambda m: m(X), "a derivative may be asked for"),
    "untraceable": (Branches, lambda m: m(X), "branches on a tensor's values"),
    "arguments": (Optional, lambda m: m(X, 2.0), "an argument is float, not a tensor"),
    "empty": (lambda: nn.Sequential(*unit()), lambda m: m(X[:0]), "an input is empty"),
}


@pytest.mark.parametrize("make, call, reason", STOCK.values(), ids=STOCK)
def test_one_warning_where_most_calls_run_as_stock(make, call, reason, trained, caplog):
    fused = rf.fuse(trained(make()))
    with torch.set_grad_enabled(reason.startswith("a derivative")):
        for _ in range(10):
            call(fused)
        assert not caplog.text
        for _ in range(30):
            call(fused)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()
    assert "See rf.report" in record.getMessage()
    report = rf.report(fused, file=io.StringIO())
    assert (report.calls_fused, report.calls_stock) == (0, 40)
    assert reason in report.reason
    assert reason in str(report)


def test_no_warning_where_most_calls_are_served(trained, caplog):
    model = trained(Unit())
    fused = rf.fuse(model)
    for _ in range(30):
        check(fused, model, X)
    for _ in range(20):
        fused(X)
    assert not caplog.text
    assert counts(fused) == (30, 20)


def test_training_is_no_reason_for_a_warning(trained, caplog):
    fused = rf.fuse(trained(Unit())).train()
    for _ in range(30):
        fused(X)
    assert not caplog.text
    assert counts(fused) == (0, 0)


def test_parts_that_serve_count_as_served(trained, caplog):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Unit()

        def forward(self, x):
            y = self.part(x)
            return y if y.sum() > 0 else -y

    model = trained(Parent())
    fused = rf.fuse(model)
    for _ in range(20):
        check(fused, model, X)
    assert not caplog.text
    assert counts(fused) == (20, 0)


def test_counts_of_a_copy_begin_anew(trained):
    import copy

    model = trained(Unit())
    fused = rf.fuse(model)
    check(fused, model, X)
    other = copy.deepcopy(fused)
    assert counts(other) == (0, 0)
    check(other, model, X)
    assert counts(fused) == (1, 0)
