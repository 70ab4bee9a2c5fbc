"""The trial when a GPU first meets a problem, with the CPU in the GPU's place and times that a test gives."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from resnet_fused import backends
from resnet_fused.backends import BackendError, Problem, binding, first_call, get, gpu_time, records
from resnet_fused.backends.problem import Conv, Folded

pytestmark = pytest.mark.cpu

CONV = Conv(16, 16, (3, 3), (1, 1), (1, 1))
PROBLEM = Problem("conv2d_bn_add_relu", (10, 16, 6, 6), torch.float32, torch.device("cpu"), (CONV,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the records; the CPU's backends are tried."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_call, "_DEVICE", "cpu")
    monkeypatch.setattr(first_call, "_BACKENDS", ("reference", "onednn", "cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first_call._say_once.cache_clear()
    first_call._warn_of_disk.cache_clear()
    records.forget()
    yield tmp_path
    records.forget()


def folded() -> Folded:
    return Folded((torch.randn(16, 16, 3, 3) / 12,), (torch.randn(16),))


def fake_times(monkeypatch, ms: dict[str, float]) -> list[str]:
    """Backends take the given times; the list gets the names of those that are timed."""
    timed: list[str] = []

    def times(calls):
        timed.extend(calls)
        return {name: ms.get(name.partition(":")[0], 1.0) for name in calls}

    monkeypatch.setattr(gpu_time, "medians", times)
    return timed


def test_the_fastest_is_taken_and_kept(monkeypatch, cache):
    timed = fake_times(monkeypatch, {"reference": 1.0, "onednn": 0.5, "cpu": 0.8})
    assert binding.bind(PROBLEM, folded(), "auto").backend == "onednn"
    assert timed[0] == "reference"
    assert len(timed) >= 2
    (file,) = cache.glob("*.json")
    entry = json.loads(file.read_text())["choices"][records.key(PROBLEM)]
    assert entry["backend"] == "onednn"
    assert entry["ms"]["reference"] == 1.0
    timed.clear()
    binding.bind(PROBLEM, folded(), "auto")
    records.forget()  # as in another process
    assert binding.bind(PROBLEM, folded(), "auto").backend == "onednn"
    assert timed == []


def test_stock_stays_where_nothing_is_clearly_faster(monkeypatch):
    fake_times(monkeypatch, {"reference": 1.0, "onednn": 0.98, "cpu": 1.2})
    assert binding.bind(PROBLEM, folded(), "auto").backend == "reference"


def test_kernels_bound_before_stay_bound(monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.5})
    generation = records.generation()
    binding.bind(PROBLEM, folded(), "auto")
    assert records.generation() == generation


def wrong(y: torch.Tensor) -> torch.Tensor:
    return y + 0.1


def wrong_in_the_middle(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[5] += 0.1
    return y


def unwritten(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[4, 0, 0, 0] = torch.nan
    return y


@pytest.mark.parametrize("spoil", [wrong, wrong_in_the_middle, unwritten], ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_dropped_with_a_warning(spoil, monkeypatch, caplog):
    fake_times(monkeypatch, {"onednn": 0.1, "cpu": 0.5})
    onednn = get("onednn")
    prepare = type(onednn).prepare

    def spoilt(self, *args):
        kernel = prepare(self, *args)
        return lambda x, residual: spoil(kernel(x, residual))

    monkeypatch.setattr(type(onednn), "prepare", spoilt)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "cpu"
    assert "onednn is wrong for conv2d_bn_add_relu" in caplog.text
    assert [*records.dropped(PROBLEM)] == ["onednn"]


def test_a_kernel_that_fails_is_passed_over_and_not_recorded_as_wrong(monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.1, "cpu": 0.5})

    def fail(self, *args):
        raise BackendError("no engine")

    monkeypatch.setattr(type(get("onednn")), "prepare", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "cpu"
    assert not records.dropped(PROBLEM)


def test_rules_choose_where_memory_does_not_suffice(monkeypatch):
    def fail(problem, folded, special):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(first_call, "Truth", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == backends.by_rules(PROBLEM).name
    assert records.choice(PROBLEM) is None


def test_the_choice_holds_where_the_disk_is_full(monkeypatch, caplog):
    fake_times(monkeypatch, {"onednn": 0.5})

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(records.tempfile, "mkstemp", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "onednn"
    assert "No space left" in caplog.text
    assert "RESNET_FUSED_CACHE_DIR" in caplog.text
    assert records.choice(PROBLEM).backend == "onednn"


def switched_off(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_TRIAL", "0")


def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def deterministic(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


@pytest.mark.parametrize("prevent", [switched_off, capturing, deterministic], ids=lambda f: f.__name__)
def test_no_trial_is_made(prevent, monkeypatch):
    timed = fake_times(monkeypatch, {"onednn": 0.1})
    prevent(monkeypatch)
    assert binding.bind(PROBLEM, folded(), "auto").backend == backends.by_rules(PROBLEM).name
    assert not timed


def test_no_trial_for_an_explicit_choice(monkeypatch):
    timed = fake_times(monkeypatch, {})
    assert binding.bind(PROBLEM, folded(), "onednn").backend == "onednn"
    assert not timed


def test_what_other_candidates_packed_goes_with_the_trial(monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.1, "cpu": 0.5})
    own = folded()
    assert binding.bind(PROBLEM, own, "auto").backend == "onednn"
    alone = folded()
    get("onednn").prepare(PROBLEM, alone)
    assert {*own.packings} == {*alone.packings}


def test_launches_are_made_while_the_gpu_sleeps(monkeypatch):
    """A kernel's time is the GPU's, not the host's: launches are made before the first event is reached."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    ms = gpu_time.medians({"a": lambda: done.append("a")})
    assert ms == {"a": 2.0 / gpu_time._FEWEST}
    first = done.index("sleep")
    assert done[first : first + 5] == ["sleep", "event", "a", "event", "wait"]


def test_a_shift_with_anothers_lives_as_long_as_its_own():
    """And no longer, without a garbage collection."""
    own, other = folded(), folded()
    weak = weakref.ref(own.with_shift_of(other)), weakref.ref(own)
    assert torch.equal(weak[0]().shifts[0], own.shifts[0] + other.shifts[0])
    assert own.with_shift_of(other) is weak[0]()
    gc.disable()
    try:
        del own
        assert [ref() for ref in weak] == [None, None]
    finally:
        gc.enable()


class TestProjection:
    """On a GPU the projection's shift is added with that of the last convolution."""

    convs = (Conv(8, 16, (3, 3), (2, 2), (1, 1)), Conv(16, 16, (3, 3), (1, 1), (1, 1)), Conv(8, 16, (1, 1), (2, 2)))

    def test_parts(self):
        parameters = Folded(
            tuple(torch.randn(c.out_channels, c.in_channels, *c.kernel) / 5 for c in self.convs),
            tuple(torch.randn(c.out_channels) for c in self.convs),
        )
        block = Problem("basic_block", (2, 8, 6, 6), torch.float32, torch.device("cuda", 0), self.convs, True)
        parts = binding.parts(block, parameters)
        assert [part.op for part, _ in parts] == ["conv2d_bn_relu", "conv2d_bn_add_relu", "conv2d"]
        (shift,) = parts[1][1].shifts
        torch.testing.assert_close(shift, parameters.shifts[1] + parameters.shifts[2])
        assert binding.parts(block, parameters)[1][1] is parts[1][1]
        assert [part.op for part, _ in binding.parts(block, parameters, "cuda")][-1] == "conv2d_bn"
        assert binding.parts(block, parameters, "cuda")[1][1].shifts[0] is parameters.shifts[1]

    def test_values(self, monkeypatch):
        """The composition with the shift moved, on the CPU, is the block."""
        parameters = Folded(
            tuple(torch.randn(c.out_channels, c.in_channels, *c.kernel) / 5 for c in self.convs),
            tuple(torch.randn(c.out_channels) for c in self.convs),
        )
        x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        block = Problem("basic_block", (2, 8, 6, 6), torch.float32, torch.device("cpu"), self.convs, True)
        moved = binding.parts(Problem(*(*vars(block).values(),)[:3], torch.device("cuda", 0), self.convs, True), parameters)
        kernels = [get("reference").prepare(part, own) for part, own in moved]
        want = get("reference").prepare(block, parameters)(x, None)
        torch.testing.assert_close(binding._block(block, kernels)(x, None), want, rtol=1e-5, atol=1e-5)

    def test_a_new_projection_gives_a_new_shift(self):
        own, other = folded(), folded()
        first = own.with_shift_of(other)
        assert own.with_shift_of(other) is first
        another = folded()
        torch.testing.assert_close(own.with_shift_of(another).shifts[0], own.shifts[0] + another.shifts[0])


def test_an_automatic_choice_that_can_not_be_prepared_ends_with_stock(monkeypatch):
    def fail(self, *args):
        raise BackendError("no engine")

    monkeypatch.setenv("RESNET_FUSED_TRIAL", "0")
    name = backends.by_rules(PROBLEM).name
    monkeypatch.setattr(type(get(name)), "prepare", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "reference"
    with pytest.raises(BackendError, match="no engine"):
        binding.bind(PROBLEM, folded(), name)
