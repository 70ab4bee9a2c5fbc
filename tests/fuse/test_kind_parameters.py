"""Parameters that someone else writes: through .data, by numpy, another process, an old optimizer."""

from __future__ import annotations

import copy
import multiprocessing

import numpy as np
import pytest
import torch
from support.kinds import Unit, check, counts, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 6, 6)


def _weights(model):
    return [p for p in model.parameters() if p.dim() == 4]


def _numpy_write(p):
    p.detach().numpy()[:] *= 0.5


def _other_process(p):
    """Writes shared memory in a process of its own, by numpy, since PyTorch's threads don't outlive a fork."""
    array = p.detach().numpy()
    child = multiprocessing.get_context("fork").Process(target=lambda: np.multiply(array, 0.5, out=array))
    child.start()
    child.join(60)
    assert child.exitcode == 0


WRITES = {
    "data-mul_": lambda p: p.data.mul_(0.5),
    "data-copy_": lambda p: p.data.copy_(p.data * 0.5),
    "data-assigned": lambda p: setattr(p, "data", p.data * 0.5),
    "data-assigned-flipped": lambda p: setattr(p, "data", p.data.flip(0)),
    "detached": lambda p: p.detach().mul_(0.5),
    "numpy": _numpy_write,
    "other-process": _other_process,
}
COUNTED = ("data-assigned", "data-assigned-flipped", "detached")
MODELS = {
    "drop-in": lambda: rf.BasicBlock(8, 8),
    "drop-in-bottleneck": lambda: rf.Bottleneck(8, 4, 2),
    "drop-in-in-sequential": lambda: nn.Sequential(rf.BasicBlock(8, 16, 2)),
    "unit": Unit,
    "sequential": lambda: nn.Sequential(*unit(), *unit(8, 16)),
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "write",
    # Writes that PyTorch doesn't count are noticed in CPU memory only.
    [pytest.param(write, id=name, marks=() if name in COUNTED else pytest.mark.cpu) for name, write in WRITES.items()],
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as-it-is"])
@torch.no_grad()
def test_written_parameters_are_used_at_the_next_call(make, write, fuse, trained):
    model = trained(make())
    model.share_memory()
    if fuse:
        rf.fuse(model, inplace=True)
    for _ in range(2):
        before = model(X)
    for p in _weights(model):
        write(p)
    got = model(X)
    stock = make().eval()
    stock.load_state_dict(model.state_dict())
    want = copy.deepcopy(stock).double()(X.double()).float()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-2)
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    if fuse:
        assert counts(model)[0] >= 3


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_parameters_can_be_swapped_once_nothing_watches_them(make, trained):
    """docs/guarantees.md, Limits: swap_tensors asks that nobody else hold a parameter, and a fast path watches them."""
    model = trained(make())
    fused = rf.fuse(model)
    check(fused, model, X)
    with pytest.raises(RuntimeError, match="use_count"):
        torch.utils.swap_tensors(next(fused.parameters()), nn.Parameter(next(fused.parameters()).detach()))
    for m in (model, fused):
        rf.unfuse(m)  # drop-in blocks have paths of their own
    for m in (model, fused):
        for p in m.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.5))
    check(rf.fuse(fused), model, X)


class DataSGD(torch.optim.Optimizer):
    """Writes parameters through .data, as optimizers of before PyTorch 1.5 do."""

    def __init__(self, params, assign=False):
        super().__init__(params, {"assign": assign})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if group["assign"]:
                    p.data = p.data - 0.1 * p.grad.data
                else:
                    p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize(
    "assign", [pytest.param(False, marks=pytest.mark.cpu, id="in-place"), pytest.param(True, id="assigned")]
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_optimizer_that_writes_data(make, assign, trained):
    model = trained(make())
    fused = rf.fuse(model)
    optimizers = [DataSGD(m.parameters(), assign) for m in (model, fused)]
    for _ in range(3):
        check(fused, model, X)
        for m, optimizer in zip((model, fused), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()
    check(fused, model, X)
