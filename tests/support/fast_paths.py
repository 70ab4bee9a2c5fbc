"""What tests ask of a fused model: what its report says, what ran, and whether it is still the model that it was."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.fusion.rows import Row, path_of
from resnet_fused.runtime.run import Run

needs_kernels = pytest.mark.skipif(
    backends.get("cpu").unavailable() is not None, reason=f"cpu backend: {backends.get('cpu').unavailable()}"
)

# csrc/cpu/activations.cpp makes tensors of its own memory with torch_from_blob, which came with PyTorch 2.11.
needs_kept_memory = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="the CPU kernels keep the memory of results only on PyTorch 2.11 and newer; install one"
)


def report(model: nn.Module) -> rf.Report:
    return rf.report(model, file=io.StringIO())


def rows(model: nn.Module) -> list[Row]:
    return report(model).rows


def runs(model: nn.Module) -> list[Run]:
    """The programs that served, at whichever module, one for each kind of input."""
    paths = [path_of(module) for module in model.modules()]
    return [run for path in paths if path is not None for run in path.runs()]


def served(model: nn.Module) -> list[tuple[str, str]]:
    """Op and backend of each step that ran so far, for each kind of input."""
    return [(problem.label, backend) for run in runs(model) for problem, backend in run.problems.values()]


def ops(model: nn.Module) -> Counter[str]:
    """How often each op ran; 0 for others."""
    return Counter(op for op, _ in served(model))


def assert_same_model(fused: nn.Module, model: nn.Module) -> None:
    """Asserts that a fused model is what it was: classes, modules, parameters, buffers, keys, and what it prints."""
    assert type(fused) is type(model)
    for names in ("named_modules", "named_parameters", "named_buffers"):
        a, b = ({name: type(value) for name, value in getattr(m, names)()} for m in (fused, model))
        assert list(a.items()) == list(b.items())
    assert list(fused.state_dict()) == list(model.state_dict())
    assert fused.state_dict()._metadata == model.state_dict()._metadata
    for (name, a), b in zip(fused.named_children(), model.children(), strict=True):
        assert repr(a) == repr(b), name
    # What is fused stands in one line of its own.
    ours, stocks = repr(fused).splitlines(), repr(model).splitlines()
    assert [line for line in ours if "fused by resnet_fused: " not in line] == stocks or len(ours) < 3
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
