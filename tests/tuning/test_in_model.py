"""Candidates in their place in a model: which kernels run, whose times are taken, and what is left behind."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch
from support.fast_paths import runs
from torch import nn

import resnet_fused as rf
from resnet_fused import tuning
from resnet_fused.backends import get, tuning_cache
from resnet_fused.backends.binding import override_kernels
from resnet_fused.tuning import in_model
from resnet_fused.tuning.in_model import InModel

pytestmark = pytest.mark.cpu

CANDIDATES = ["reference", "onednn", "cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the tuning_cache."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(in_model, "_SECONDS", 0.0)
    tuning_cache.forget()
    yield
    tuning_cache.forget()


def layer(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()]


@pytest.fixture
def model() -> nn.Module:
    """Two layers that pose the same problem, and one that poses another."""
    return rf.fuse(nn.Sequential(*layer(8), *layer(8), *layer(16)).eval())


@pytest.fixture
def run(model):
    x = torch.randn(2, 8, 6, 6)

    def call():
        with torch.no_grad():
            return model(x)

    return call


@pytest.fixture
def keys(model) -> list[str]:
    """The problems' keys, the one posed twice first."""
    with torch.no_grad():
        return [*tuning.tasks_of(model, (torch.randn(2, 8, 6, 6),))]


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a candidate's call takes the time that `costs` gives for its name and the call's number in the run."""
    now, costs, prepare, calls = [0.0], {}, in_model.prepare, itertools.count()

    def slow(problem, folded, name):
        kernel = prepare(problem, folded, name)

        def call(x, residual):
            now[0] += costs[name, next(calls) % 3]
            return kernel(x, residual)

        return call

    monkeypatch.setattr(in_model, "prepare", slow)
    monkeypatch.setattr(in_model, "time_mark", lambda device: now[0])
    return costs


def measure(model: InModel, keys: list[str], kept: dict[str, set[str]]) -> dict[str, dict[str, list[float]]]:
    with override_kernels(model.kernel_for):
        return model.measure(dict.fromkeys(keys, CANDIDATES), kept, lambda text: None)


def test_a_model_runs_on_what_is_chosen_at_each_call(run, keys, monkeypatch):
    expected, ran = run(), []
    for name in CANDIDATES:
        prepare = get(name).prepare

        def noted(problem, folded, *variant, name=name, prepare=prepare):
            kernel = prepare(problem, folded, *variant)
            return lambda x, residual: ran.append(name) or kernel(x, residual)

        monkeypatch.setattr(get(name), "prepare", noted)
    model = InModel(run, dict.fromkeys(keys, "reference"))
    with override_kernels(model.kernel_for):
        for first, second in itertools.product(CANDIDATES, repeat=2):
            ran.clear()
            model.chosen.update(zip(keys, (first, second), strict=True))
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
            assert ran == [first, first, second]


def test_times_are_those_of_the_calls_in_the_model(run, keys, clock):
    """The second layer costs another time than the first one, and only a run of the model has both."""
    for name, cost in zip(CANDIDATES, (3.0, 2.0, 4.0), strict=True):
        clock.update({(name, 0): cost, (name, 1): cost / 2, (name, 2): 10 * cost})
    model = InModel(run, dict.fromkeys(keys, "reference"))
    times = measure(model, keys, {key: {"reference"} for key in keys})
    for key, factor in zip(keys, (0.75, 10), strict=True):
        assert {name: set(found) for name, found in times[key].items()} == {
            "reference": {3 * factor},
            "onednn": {2 * factor},
        }
        assert all(len(found) >= in_model._TURNS for found in times[key].values())


def test_a_hopeless_candidate_is_timed_to_the_end_only_where_it_is_kept(run, keys, clock):
    clock.update({(name, call): 9.0 if name == "cpu" else 1.0 for name in CANDIDATES for call in range(3)})
    model = InModel(run, dict.fromkeys(keys, "reference"))
    kept = dict(zip(keys, ({"cpu"}, {"reference"}), strict=True))
    times = measure(model, keys, kept)
    assert [sorted(times[key]) for key in keys] == [sorted(CANDIDATES), ["onednn", "reference"]]


def test_the_whole_model_is_timed_with_each_choice(run, keys, monkeypatch):
    """By what the clock says while one choice's kernels run."""
    costs = {"reference": 5.0, "onednn": 3.0, "cpu": 1.0}
    now, prepare = [0.0], in_model.prepare

    def slow(problem, folded, name):
        kernel = prepare(problem, folded, name)

        def call(x, residual):
            now[0] += costs[name]
            return kernel(x, residual)

        return call

    monkeypatch.setattr(in_model, "prepare", slow)
    monkeypatch.setattr(in_model.time, "perf_counter", lambda: now[0])
    choices = {name: dict.fromkeys(keys, name) for name in CANDIDATES}
    choices["mixed"] = dict(zip(keys, ("cpu", "onednn"), strict=True))
    model = InModel(run, dict.fromkeys(keys, "reference"))
    with override_kernels(model.kernel_for):
        times = model.compare(choices, lambda text: None)
    assert {name: set(found) for name, found in times.items()} == {
        "reference": {15.0},
        "onednn": {9.0},
        "cpu": {3.0},
        "mixed": {5.0},
    }
    assert {len(found) for found in times.values()} == {in_model._TURNS}


def test_on_a_gpu_launches_queue_up_before_each_timed_run(run, keys, monkeypatch):
    """At small batch the host takes longer than the kernels, and events would time it."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            done.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    model = InModel(lambda: (done.append("run"), time.sleep(0.004)), dict.fromkeys(keys, "reference"))
    model.devices = {torch.device("cuda", 0)}
    times = model.compare({"one": {}}, lambda text: None)
    assert set(times["one"]) == {2e-3}
    first, second = done[:4], done[4:8]
    assert first == ["sleep 2000000", "event", "run", "event"]
    assert second[1:] == first[1:]
    assert int(second[0].split()[1]) > 4 * 2_000_000  # as long as the host took
    done.clear()
    model.measure({"a problem": ["reference"]}, {"a problem": {"reference"}}, lambda text: None)
    assert done[2] == "run"
    assert done[0].startswith("sleep")


def test_a_gpu_that_the_first_run_binds_kernels_on_is_timed_from_the_second_on(monkeypatch):
    marked: list[torch.device] = []
    monkeypatch.setattr(in_model, "time_mark", lambda device: marked.append(device) or 0.0)
    monkeypatch.setattr(in_model, "let_launches_queue", lambda milliseconds: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    gpu = torch.device("cuda", 0)
    model = InModel(lambda: model.devices.add(gpu), {})
    model.measure({"a problem": ["reference"]}, {"a problem": set()}, lambda text: None)
    assert marked
    assert {*marked} == {gpu}


@pytest.mark.parametrize("problem", ["interrupted", "records-can-not-be-kept"])
def test_no_kernel_of_the_measurements_stays_in_the_model(problem, model, run, keys, monkeypatch, tmp_path):
    served = []
    serve = InModel.kernel_for
    monkeypatch.setattr(InModel, "kernel_for", lambda self, p, folded: served.append(serve(self, p, folded)) or served[-1])
    if problem == "interrupted":
        monkeypatch.setattr(InModel, "compare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(model, torch.randn(2, 8, 6, 6), progress=False)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "file"))
        assert tuning.tune(model, torch.randn(2, 8, 6, 6), progress=False).path is None
    assert served
    run()
    (kept,) = runs(model)
    assert [backend for _, backend in kept.problems.values()] == 3 * ["cpu"]
    reached = {id(value) for operation in kept.operations for value in _reached(operation.run)}
    assert len(reached) > 3
    assert not reached & {*map(id, served)}


def _reached(function) -> list:
    """What a function's closure holds, and what is held by that."""
    found, held = [], [function]
    while held:
        value = held.pop()
        if any(value is other for other in found):
            continue
        found.append(value)
        held += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        held += [*vars(value).values()] if hasattr(value, "__dict__") and not isinstance(value, type) else []
        held += value if isinstance(value, (list, tuple)) else []
    return found
