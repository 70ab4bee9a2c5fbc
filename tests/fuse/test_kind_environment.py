"""What is around a model: default device and dtype, numpy's memory, locks, lazy modules, random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 6, 6)

# ---- defaults ----------------------------------------------------------------------------------------------------------

META = """
import torch, resnet_fused as rf
from torch import nn
layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), rf.BasicBlock(8, 8), rf.Bottleneck(8, 2)]
model = nn.Sequential(*layers).eval()
fused, late, x = rf.fuse(model), rf.fuse(model), torch.randn(1, 3, 9, 9)
with torch.no_grad():
    want = model(x)
    fused(x)
    torch.set_default_device("meta")
    new = rf.fuse(model)
    for f in (fused, late, new):
        for _ in range(2):
            y = f(x)
            assert y.device.type == "cpu", y.device
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.set_default_device("cpu")
import io
for f in (fused, late, new):
    assert rf.report(f, file=io.StringIO()).calls_stock == 0
print("right")
"""


def test_the_meta_device_as_the_default_before_the_first_call():
    found = subprocess.run([sys.executable, "-c", META], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert found.stdout.strip() == "right", found.stderr[-2000:]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_in_a_with_block(device, when, trained):
    model = trained(nn.Sequential(*unit(), rf.BasicBlock(8, 8)))
    if when == "after":
        fused = rf.fuse(model)
    with torch.device(device):
        if when == "before":
            fused = rf.fuse(model)
        with torch.no_grad():
            got = fused(X)
    assert got.device == X.device
    with torch.no_grad():
        assert_same(got, model(X))
    check(fused, model, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_default_dtype(dtype, when, trained):
    model = trained(nn.Sequential(*unit(), rf.BasicBlock(8, 8)))
    fused = rf.fuse(model) if when == "after" else None
    torch.set_default_dtype(dtype)
    try:
        fused = fused or rf.fuse(model)
        for _ in range(2):
            assert check(fused, model, X).dtype == torch.float32
        assert counts(fused) == (2, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    check(fused, model, X)


def test_a_model_made_with_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(*unit(), rf.BasicBlock(8, 8)).eval()
        fused, x = rf.fuse(model), torch.randn(1, 8, 6, 6)
        assert check(fused, model, x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    check(fused, model, x)


# ---- memory of others --------------------------------------------------------------------------------------------------

ARRAYS = {
    "plain": lambda: np.random.rand(1, 8, 6, 6).astype(np.float32),  # noqa: NPY002
    "images": lambda: np.ones((1, 6, 6, 8), np.float32).transpose(0, 3, 1, 2),
    "reversed-copy": lambda: np.ascontiguousarray(np.ones((1, 8, 6, 6), np.float32)[..., ::-1]),
    "strided": lambda: np.ones((1, 8, 12, 6), np.float32)[:, :, ::2],
    "offset": lambda: np.ones(1 + 8 * 36, np.float32)[1:].reshape(1, 8, 6, 6),
}


@pytest.mark.cpu
@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_inputs_of_numpys_memory(make, trained):
    model = trained(nn.Sequential(*unit(), rf.BasicBlock(8, 8)))
    fused, array = rf.fuse(model), make()
    x = torch.from_numpy(array)
    first = check(fused, model, x)
    array *= -2
    second = check(fused, model, x)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_array_and_a_misaligned_one(trained):
    model = trained(nn.Sequential(*unit()))
    fused, array = rf.fuse(model), np.ones((1, 8, 6, 6), np.float32)
    array.flags.writeable = False
    check(fused, model, torch.from_numpy(array))
    memory = bytearray(1 + 4 * 8 * 36)
    shifted = torch.frombuffer(memory, dtype=torch.uint8)[1:].view(torch.uint8).clone().view(torch.float32).view(1, 8, 6, 6)
    check(fused, model, shifted)


# ---- what can't be copied, or has no shape yet -------------------------------------------------------------------------


class Locked(Unit):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return super().forward(x)


class UsesLock(Locked):
    def forward(self, x):
        with self.lock:
            return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(*unit(), m)], ids=["root", "part"])
@pytest.mark.parametrize("kind", [Locked, UsesLock])
def test_a_model_that_holds_a_lock(kind, around, trained):
    model = trained(around(kind()))
    with pytest.raises(TypeError, match="inplace=True"):
        rf.fuse(model)
    with torch.no_grad():
        want = model(X)
    fused = rf.fuse(model, inplace=True, example_inputs=X)
    assert fused is model
    with torch.no_grad():
        for _ in range(2):
            assert_same(fused(X), want)
    if kind is Locked or isinstance(fused, nn.Sequential):
        assert counts(fused)[0] > 0
        assert any(ops(fused))


@torch.no_grad()
def test_a_forward_that_takes_a_lock_waits_for_it(trained):
    """Another thread may hold it to change the weights."""
    fused = rf.fuse(trained(UsesLock()), inplace=True)
    want, done = fused(X), threading.Event()

    def call():
        with torch.no_grad():
            assert_same(fused(X), want)
        done.set()

    with fused.lock:
        thread = threading.Thread(target=call)
        thread.start()
        early = done.wait(0.3)
    thread.join(60)
    assert done.is_set()
    assert not early, "it ran without the lock"


LAZY = {
    "conv": lambda: nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    "norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU()),
    "linear": lambda: nn.Sequential(*unit(), nn.Flatten(), nn.LazyLinear(3)),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
def test_lazy_modules(make, trained):
    model = make().eval()
    with pytest.raises(ValueError, match="lazy module, which has no shape yet. Call the model once"):
        rf.fuse(model)
    with torch.no_grad():
        model(X)
    check(rf.fuse(trained(model)), model, X)


# ---- random numbers ----------------------------------------------------------------------------------------------------


def _monte_carlo():
    return nn.Sequential(
        *unit(), nn.Dropout2d(0.5), Unit(), nn.Dropout(0.5), rf.BasicBlock(8, 8), nn.Flatten(), nn.Dropout(0.2)
    )


def _drop_train(model):
    for m in model.modules():
        if "Dropout" in type(m).__name__:
            m.train()


def _sample(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("when", ["before", "after", "after-a-call"])
def test_monte_carlo_dropout(when, trained):
    model = trained(_monte_carlo())
    if when == "before":
        _drop_train(model)
    fused = rf.fuse(model)
    if when == "after-a-call":
        check(fused, model, X)
    if when != "before":
        _drop_train(model)
        _drop_train(fused)
    for seed in range(3):
        assert_same(_sample(fused, seed), _sample(model, seed))
    samples = torch.stack([_sample(fused, seed) for seed in range(8)])
    assert (samples.std(0) > 0).float().mean() > 0.5
    served, stock = counts(fused)
    assert stock == 0
    assert served >= 11
    fused.eval()
    check(fused, model.eval(), X)
    assert torch.equal(_sample(fused, 0), _sample(fused, 1))
