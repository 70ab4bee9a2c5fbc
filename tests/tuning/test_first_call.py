"""The trial when a GPU first meets a problem, with the CPU in the GPU's place and times that a test gives."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from support.problems import problem_of

from resnet_fused import backends
from resnet_fused.backends import BackendError, ConvParameters, Problem, binding, first_call, get, gpu_time, tuning_cache
from resnet_fused.backends.problem import Conv

pytestmark = pytest.mark.cpu

CONV = Conv(16, 16, (3, 3), (1, 1), (1, 1))
WIDE = Conv(64, 64, (3, 3), (1, 1), (1, 1))
PROBLEM = problem_of("conv2d_bn_add_relu", (10, 16, 6, 6), torch.float32, torch.device("cpu"), (CONV,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the records; the CPU's backends are tried."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_call, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first_call.say_once.cache_clear()
    first_call.warn_of_disk.cache_clear()
    tuning_cache.forget()
    yield tmp_path
    tuning_cache.forget()


def folded() -> ConvParameters:
    return ConvParameters((torch.randn(16, 16, 3, 3) / 12,), (torch.randn(16),))


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
    entry = json.loads(file.read_text())["choices"][tuning_cache.key(PROBLEM)]
    assert entry["backend"] == "onednn"
    assert entry["ms"]["reference"] == 1.0
    timed.clear()
    binding.bind(PROBLEM, folded(), "auto")
    tuning_cache.forget()  # as in another process
    assert binding.bind(PROBLEM, folded(), "auto").backend == "onednn"
    assert timed == []


@pytest.mark.parametrize("whole, taken", [(0.5, "cpu"), (0.98, "parts"), (2.0, "parts")], ids=["faster", "level", "slower"])
def test_a_whole_block_is_tried_beside_its_parts(whole, taken, monkeypatch):
    timed = fake_times(monkeypatch, {"parts": 1.0, "cpu": whole})
    block = problem_of("basic_block", (2, 64, 12, 12), torch.float32, torch.device("cpu"), (WIDE, WIDE), False)
    weights = tuple(torch.randn(64, 64, 3, 3) / 24 for _ in range(2))
    parameters = ConvParameters(weights, tuple(torch.randn(64) for _ in range(2)))
    kernel = binding.bind(block, parameters, "auto").kernel
    assert tuning_cache.choice(block).backend == taken
    assert timed.count("parts") == 1
    x = torch.randn(2, 64, 12, 12).contiguous(memory_format=torch.channels_last)
    expected = get("reference").prepare(block, parameters)(x, None)
    torch.testing.assert_close(kernel(x, None), expected, rtol=1e-4, atol=1e-4)
    timed.clear()
    binding.bind(block, parameters, "auto")
    assert timed == []


def test_a_whole_block_that_is_wrong_is_dropped(monkeypatch, caplog):
    fake_times(monkeypatch, {"parts": 1.0, "cpu": 0.1})
    block = problem_of("basic_block", (2, 64, 12, 12), torch.float32, torch.device("cpu"), (WIDE, WIDE), False)
    parameters = ConvParameters(tuple(torch.randn(64, 64, 3, 3) / 24 for _ in range(2)), (torch.randn(64), torch.randn(64)))
    prepare = type(get("cpu")).prepare

    def spoilt(self, problem, *args):
        kernel = prepare(self, problem, *args)
        return (lambda x, residual: wrong(kernel(x, residual))) if len(problem.steps) > 1 else kernel

    monkeypatch.setattr(type(get("cpu")), "prepare", spoilt)
    binding.bind(block, parameters, "auto")
    assert tuning_cache.choice(block).backend == "parts"
    assert {name.partition(":")[0] for name in tuning_cache.dropped(block)} == {"cpu"}


def test_stock_stays_where_nothing_is_clearly_faster(monkeypatch):
    fake_times(monkeypatch, {"reference": 1.0, "onednn": 0.98, "cpu": 1.2})
    assert binding.bind(PROBLEM, folded(), "auto").backend == "reference"


def test_kernels_bound_before_stay_bound(monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.5})
    generation = tuning_cache.generation()
    binding.bind(PROBLEM, folded(), "auto")
    assert tuning_cache.generation() == generation


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
    assert [*tuning_cache.dropped(PROBLEM)] == ["onednn"]


def test_a_kernel_that_fails_is_passed_over_and_not_recorded_as_wrong(monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.1, "cpu": 0.5})

    def fail(self, *args):
        raise BackendError("no engine")

    monkeypatch.setattr(type(get("onednn")), "prepare", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "cpu"
    assert not tuning_cache.dropped(PROBLEM)


def test_rules_choose_where_memory_does_not_suffice(monkeypatch):
    def fail(problem, folded, special):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(first_call, "ProblemCheck", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == backends.by_rules(PROBLEM).name
    assert tuning_cache.choice(PROBLEM) is None


def test_the_choice_holds_where_the_disk_is_full(monkeypatch, caplog):
    fake_times(monkeypatch, {"onednn": 0.5})

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tuning_cache.tempfile, "mkstemp", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "onednn"
    assert "No space left" in caplog.text
    assert "RESNET_FUSED_CACHE_DIR" in caplog.text
    assert tuning_cache.choice(PROBLEM).backend == "onednn"


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
    weak = weakref.ref(own.with_bias_of(other)), weakref.ref(own)
    assert torch.equal(weak[0]().biases[0], own.biases[0] + other.biases[0])
    assert own.with_bias_of(other) is weak[0]()
    gc.disable()
    try:
        del own
        assert [ref() for ref in weak] == [None, None]
    finally:
        gc.enable()


class TestProjection:
    """Where cuDNN serves, the projection's bias is added with that of the last convolution."""

    convs = (Conv(8, 16, (3, 3), (2, 2), (1, 1)), Conv(16, 16, (3, 3), (1, 1), (1, 1)), Conv(8, 16, (1, 1), (2, 2)))

    @pytest.fixture(autouse=True)
    def cudnn(self, monkeypatch):
        monkeypatch.setattr(type(get("cudnn")), "unavailable", lambda self: None)

    @pytest.fixture
    def parameters(self) -> ConvParameters:
        """In the order of the steps: the shortcut's first."""
        convs = (self.convs[2], *self.convs[:2])
        return ConvParameters(
            tuple(torch.randn(c.out_channels, c.in_channels, *c.kernel) / 5 for c in convs),
            tuple(torch.randn(c.out_channels) for c in convs),
        )

    def block(self, device: str) -> Problem:
        return problem_of("basic_block", (2, 8, 6, 6), torch.float32, torch.device(device), self.convs, True)

    def test_parts(self, parameters):
        block = self.block("cuda:0")
        parts = binding.divided(block, parameters)
        assert [part.problem.label for part in parts] == ["conv2d", "conv2d_bn_relu", "conv2d_bn_add_relu"]
        assert [part.reads for part in parts] == [(0,), (0,), (3, 2)]
        (bias,) = parts[2].parameters.biases
        torch.testing.assert_close(bias, parameters.biases[2] + parameters.biases[0])
        assert binding.divided(block, parameters)[2].parameters is parts[2].parameters
        by_cuda = binding.divided(block, parameters, "cuda")
        assert by_cuda[0].problem.label == "conv2d_bn"
        assert by_cuda[2].parameters.biases[0] is parameters.biases[2]

    def test_values(self, parameters):
        """The composition with the bias moved, on the CPU, is the block."""
        x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        moved = binding.divided(self.block("cuda:0"), parameters)
        kernels = [get("reference").prepare(part.problem, part.parameters) for part in moved]
        want = get("reference").prepare(self.block("cpu"), parameters)(x, None)
        ours = binding.join(kernels, [part.reads for part in moved])(x, None)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)

    def test_a_new_projection_gives_a_new_shift(self):
        own, other = folded(), folded()
        first = own.with_bias_of(other)
        assert own.with_bias_of(other) is first
        another = folded()
        torch.testing.assert_close(own.with_bias_of(another).biases[0], own.biases[0] + another.biases[0])


def test_an_automatic_choice_that_can_not_be_prepared_ends_with_stock(monkeypatch):
    def fail(self, *args):
        raise BackendError("no engine")

    monkeypatch.setenv("RESNET_FUSED_TRIAL", "0")
    name = backends.by_rules(PROBLEM).name
    monkeypatch.setattr(type(get(name)), "prepare", fail)
    assert binding.bind(PROBLEM, folded(), "auto").backend == "reference"
    with pytest.raises(BackendError, match="no engine"):
        binding.bind(PROBLEM, folded(), name)
