"""Several threads: models that run while another is fused, tuned or verified, and one model in many threads."""

from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.kinds import Unit, assert_same, check, counts, ops, unit
from torch import fx, nn

import resnet_fused as rf
from resnet_fused.fusion import tracing

WAIT = 60


class _Gate:
    """A place where one thread stops until it is told to go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def stop(self, *args) -> None:
        self.reached.set()
        assert self.go.wait(WAIT)


def _state() -> list[object]:
    """What a tracer might patch for all threads."""
    names = ("__call__", "_call_impl", "__getattr__", "__setattr__", "forward")
    functions = [getattr(nn.Module, name) for name in names] + [vars(fx.Proxy).get("__iter__"), fx.Tracer.trace]
    layers = [kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential)]
    functions += [torch.nn.functional.conv2d, torch.relu, torch.Tensor.add, len, isinstance]
    return [
        *functions,
        *layers,
        fx._symbolic_trace.is_fx_tracing(),
        sys.getprofile(),
        torch.overrides._get_current_function_mode(),
    ]


def _stopping_in_trace(monkeypatch, gate: _Gate, model: nn.Module):
    """rf.fuse that stops while it traces. Compiled as PyTorch's own code, which the trace doesn't look at."""
    original = tracing.Tracer.create_node
    source = "def create_node(self, *args, **kwargs):\n    gate.stop()\n    return original(self, *args, **kwargs)\n"
    names = {"gate": gate, "original": original}
    exec(compile(source, torch.__file__, "exec"), names)
    trusted = compile("def stop(*args):\n    reached.set()\n    go.wait(60)\n", torch.__file__, "exec")
    inner = {"reached": gate.reached, "go": gate.go}
    exec(trusted, inner)
    gate.stop = inner["stop"]
    monkeypatch.setattr(tracing.Tracer, "create_node", names["create_node"])
    return lambda: rf.fuse(model)


def _hooked(gate: _Gate, model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(gate.stop)
    return model


def _stopping_in_verify(monkeypatch, gate: _Gate, model: nn.Module):
    fused, x = _hooked(gate, rf.fuse(model)), torch.randn(1, 8, 6, 6)  # a default device is a thread's own
    return lambda: rf.verify(model, fused, x)


def _stopping_in_tune(monkeypatch, gate: _Gate, model: nn.Module):
    fused, x = _hooked(gate, rf.fuse(model)), torch.randn(1, 8, 6, 6)
    return lambda: rf.tune(fused, x)


STOPS = {"fuse": _stopping_in_trace, "verify": _stopping_in_verify, "tune": _stopping_in_tune}


@pytest.mark.parametrize("make", STOPS.values(), ids=STOPS)
def test_other_models_work_while_a_thread_is_at_work_on_one(make, trained, monkeypatch):
    other, x = trained(nn.Sequential(*unit(), *unit())), torch.randn(2, 8, 7, 7)
    fused, late, before = rf.fuse(other), rf.fuse(other), _state()
    check(fused, other, x)
    check(late, other, x)
    gate = _Gate()
    work = make(monkeypatch, gate, trained(nn.Sequential(Unit(), nn.Sequential(*unit()))))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            assert gate.reached.wait(WAIT)
            assert _state() == before
            check(fused, other, x)
            assert type(fx.symbolic_trace(nn.Sequential(nn.ReLU()))(x)) is torch.Tensor
            with torch.no_grad():
                assert_same(fused(x.to(memory_format=torch.channels_last)), other(x.to(memory_format=torch.channels_last)))
            monkeypatch.undo()
            new = rf.fuse(other)
            check(new, other, x)
            model = nn.Sequential(*unit()).train()
            model(x).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
        finally:
            gate.go.set()
        assert future.result(WAIT) is not None
    assert _state() == before


MODELS = {
    "sequential": lambda: nn.Sequential(*unit(), *unit()),
    "module": lambda: Unit(),
    "block": lambda: rf.BasicBlock(8, 8),
    "nested": lambda: nn.Sequential(Unit(), nn.Sequential(Unit(), *unit())),
}


def test_several_fuse_at_once(trained):
    models = [trained(make()) for make in MODELS.values()] * 3
    x, before = torch.randn(1, 8, 6, 6), _state()
    with ThreadPoolExecutor(4) as pool:
        fused = [*pool.map(rf.fuse, models)]
    assert _state() == before
    for own, model in zip(fused, models, strict=True):
        check(own, model, x)
        assert all(ops(own))


def test_several_fuse_of_one_model_at_once(trained):
    model, x = trained(MODELS["nested"]()), torch.randn(1, 8, 6, 6)
    with ThreadPoolExecutor(4) as pool:
        for own in pool.map(rf.fuse, [model] * 8):
            check(own, model, x)


def test_first_calls_of_one_model_in_many_threads(trained):
    model = trained(MODELS["nested"]())
    fused = rf.fuse(model)
    inputs = [torch.randn(1 + i % 3, 8, 6 + i % 2, 6) for i in range(12)]
    start = threading.Barrier(4)

    @torch.no_grad()
    def call(first: int) -> None:
        start.wait(WAIT)
        for x in inputs[first:] + inputs[:first]:
            assert_same(fused(x), model(x))

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(call, range(4))]
    assert counts(fused) == (48, 0)


class _ReadersWriter:
    """A lock that many readers or one writer hold."""

    def __init__(self) -> None:
        self._condition, self._readers = threading.Condition(), 0

    @contextlib.contextmanager
    def read(self):
        with self._condition:
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def write(self):
        with self._condition:
            assert self._condition.wait_for(lambda: self._readers == 0, WAIT)
            yield


CHANGES = {
    "copy_": lambda p, new: p.copy_(new),
    "data-copy_": lambda p, new: p.data.copy_(new),
    "data-assigned": lambda p, new: setattr(p, "data", new.clone()),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name, marks=pytest.mark.cpu if name == "data-copy_" else ()) for name, change in CHANGES.items()],
)
def test_many_threads_call_one_model_while_another_changes_its_weights(change, trained):
    versions = [trained(MODELS["nested"]()) for _ in range(2)]
    shapes = [(1, 8, 6, 6), (2, 8, 6, 6), (1, 8, 5, 9), (3, 8, 4, 4)]
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        want = [[model(x) for x in inputs] for model in versions]
    fused = rf.fuse(versions[0])
    states = [[*model.state_dict().values()] for model in versions]
    lock, current, done = _ReadersWriter(), [0], threading.Event()

    def call(number: int) -> int:
        calls = 0
        with torch.no_grad():
            while not done.is_set() or calls < 5:
                with lock.read():
                    version = current[0]
                    got = fused(inputs[number])
                assert_same(got, want[version][number])
                calls += 1
        return calls

    def write() -> None:
        try:
            for i in range(12):
                with lock.write(), torch.no_grad():
                    current[0] = 1 - current[0]
                    for p, new in zip(fused.state_dict(keep_vars=True).values(), states[current[0]], strict=True):
                        change(p, new)
                done.wait(0.005 * (i % 3))
        finally:
            done.set()

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call, i) for i in range(4)]
        pool.submit(write).result(WAIT)
        total = sum(future.result(WAIT) for future in calls)
    served, stock = counts(fused)
    assert served > 0
    assert served + stock <= total
    assert served >= 0.9 * total
