"""Runs that become CUDA graphs by themselves: when, and that nothing they leave out is ever missed.

CUDA's graphs are emulated on the CPU, see graph_notes.py.
"""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
from support.fast_paths import report
from support.graph_notes import Notes
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion.cuda_graph import CudaGraphed
from resnet_fused.fusion.rows import path_of
from resnet_fused.runtime import capture, replay
from resnet_fused.runtime.replay import Replay


class Stream:
    def __init__(self, device=None):
        self.device, self.waited = device, []

    def wait_stream(self, other):
        self.waited.append(other)


class GPU:
    """What the emulation counts, and the milliseconds that the GPU is said to take for a run."""

    def __init__(self):
        self.captures, self.milliseconds, self.autocast_cache = [], 0.0, []
        self.stream = Stream()


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Puts the emulation in CUDA's place."""
    gpu = GPU()

    @contextlib.contextmanager
    def graph(notes, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert stream.device is not None
        gpu.captures.append(notes)
        gpu.autocast_cache.append(torch.is_autocast_cache_enabled())
        with notes:
            yield
        notes.spoil()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            pass

        def query(self):
            return True

        def elapsed_time(self, other):
            return gpu.milliseconds

    emulated = {
        "CUDAGraph": Notes,
        "graph_pool_handle": lambda: (0, 1),
        "Event": Event,
        "Stream": Stream,
        "graph": graph,
        "current_stream": lambda device=None: gpu.stream,
        "current_device": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in emulated.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture.stream_of.cache_clear()
    monkeypatch.setattr(capture, "close_pool", lambda device, pool: None)
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "FEWEST_OPERATIONS", 1)
    with torch.no_grad():
        yield gpu
    capture.stream_of.cache_clear()


def plain(trained) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return trained(nn.Sequential(*layers))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6)


def fuse(model: nn.Module, **arguments) -> nn.Module:
    return rf.fuse(model, backend="reference", **arguments)


def check(fused: nn.Module, model: nn.Module, calls: int = 6) -> None:
    for _ in range(calls):
        x = image()
        torch.testing.assert_close(fused(x), model(x))


def graphs(fused: nn.Module) -> int:
    return report(fused).graphs


def test_a_run_that_the_host_holds_up_becomes_a_graph(trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    inputs = [image() for _ in range(10)]
    results = [fused(x) for x in inputs]
    assert len(gpu.captures) == 1
    assert graphs(fused) == 1
    assert type(fused) is type(model)
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, model(x))


def test_a_run_that_the_gpu_holds_up_is_left_alone(trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    gpu.milliseconds = 1e6
    check(fused, model, 12)
    gpu.milliseconds = 0.0  # it was asked often enough
    check(fused, model, 12)
    assert not gpu.captures


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_may_change(mode, trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    with mode():
        check(fused, model)
    with torch.inference_mode():
        check(fused, model)
    check(fused, model)
    assert len(gpu.captures) == 1


def change_in_place(model):
    model[0].weight.mul_(2)


def load(model):
    model.load_state_dict({name: t * 2 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def swap_classifiers_memory(model):
    model[5].weight.data = model[5].weight.data * 3


def change_classifier_in_place(model):
    model[5].weight.add_(1)


def replace_classifier(model):
    torch.manual_seed(3)
    model[5] = nn.Linear(8, 7).eval()


def hook(model):
    model[3].register_forward_hook(lambda module, args, y: y + 1)


CHANGES = [change_in_place, load, swap_classifiers_memory, change_classifier_in_place, replace_classifier, hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_seen(change, trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    check(fused, model)
    assert len(gpu.captures) == 1
    change(model)
    change(fused)
    check(fused, model, 8)


def test_each_kind_of_input_has_a_graph_of_its_own_up_to_a_number(trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    for size in range(3, 16):
        for _ in range(5):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(fused(x), model(x))
    assert len(gpu.captures) == 8


def test_settings_that_ops_follow_are_seen(trained, gpu, monkeypatch):
    model = plain(trained)
    fused = fuse(model)
    check(fused, model)
    monkeypatch.setattr(replay, "current_settings", lambda device_type: ("others",))
    check(fused, model)
    assert len(gpu.captures) == 2


def test_autocast_keeps_no_weight_that_a_graph_would_read(trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            x = image()
            torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)
        assert torch.is_autocast_cache_enabled()
    assert gpu.autocast_cache == [False]


def test_threads(trained, gpu):
    model = plain(trained)
    fused = fuse(model)
    check(fused, model)
    faults = []

    def work():
        for _ in range(20):
            x = image()
            with torch.no_grad():
                if not torch.allclose(fused(x), model(x), atol=1e-5):
                    faults.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return nn.functional.dropout(self.net(x), 0.5, True)


def test_random_numbers_are_drawn_at_each_call(trained, gpu):
    fused = fuse(trained(Dropped()))
    x = image()
    results = [fused(x) for _ in range(8)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(results))
    assert not gpu.captures


def test_the_argument(trained, gpu):
    model = plain(trained)
    check(fuse(model, cuda_graph=False), model)
    assert not gpu.captures
    assert type(fuse(model, cuda_graph=True)) is CudaGraphed
    with pytest.raises(ValueError, match="cuda_graph is 'sometimes'; it must be True, False or 'auto'"):
        fuse(model, cuda_graph="sometimes")


# ---- a Replay by itself ---------------------------------------------------------------------------------------------------


def calls(run, kept, count=6):
    """The results of some calls of a Replay with runs of their own inputs."""
    made = Replay(run, kept, [])
    inputs = [torch.full((2, 2), float(i)) for i in range(count)]
    given = [x.clone() for x in inputs]
    return made, given, [made([x]) for x in inputs], inputs


def test_an_input_that_is_changed_in_place_is_the_callers(gpu):
    made, given, _, inputs = calls(lambda inputs: [inputs[0], inputs[0].add_(1)], {1})
    assert made.graph is None
    for before, x in zip(given, inputs, strict=True):
        assert torch.equal(x, before + 1)


def test_a_result_that_is_a_view_of_the_input_stays_one(gpu):
    made, _, results, inputs = calls(lambda inputs: [inputs[0], inputs[0].view(4)], {1})
    assert made.graph is None
    assert all(values[1].data_ptr() == x.data_ptr() for values, x in zip(results, inputs, strict=True))


def test_results_that_share_memory_go_on_to(gpu):
    def run(inputs):
        y = inputs[0] + 1
        return [inputs[0], y, y.view(4)]

    made, _, results, _ = calls(run, {1, 2})
    assert made.graph is None
    assert all(values[1].data_ptr() == values[2].data_ptr() for values in results)


def test_an_input_among_the_results_is_the_one_that_was_given(gpu):
    made, _, results, inputs = calls(lambda inputs: [inputs[0], inputs[0] * 2], {0, 1})
    assert made.graph is not None
    for values, x in zip(results, inputs, strict=True):
        assert values[0] is x
        assert torch.equal(values[1], x * 2)


def test_what_can_not_be_captured_runs_as_it_is(gpu, caplog):
    caplog.set_level("INFO", "resnet_fused")
    made, given, results, _ = calls(lambda inputs: [inputs[0], inputs[0] * inputs[0].sum().item()], {1})
    assert made.graph is None
    assert "can't be replayed as a CUDA graph: RuntimeError: operation not permitted" in caplog.text
    for values, x in zip(results, given, strict=True):
        assert torch.equal(values[1], x * x.sum())
    assert torch.is_autocast_cache_enabled()


def test_numbers_among_the_results(gpu):
    made, _, results, _ = calls(lambda inputs: [inputs[0], inputs[0].shape[0], inputs[0] + 1], {1, 2})
    assert made.graph is not None
    assert all(values[1] == 2 for values in results)


def test_another_stream_waits_for_the_one_before(gpu):
    made, *_ = calls(lambda inputs: [inputs[0], inputs[0] + 1], {1})
    first, gpu.stream = gpu.stream, Stream()
    made([torch.zeros(2, 2)])
    assert gpu.stream.waited == [first]
    made([torch.zeros(2, 2)])
    assert gpu.stream.waited == [first]


@pytest.mark.parametrize(
    ("x", "operations", "may"),
    [
        (torch.zeros(2, 2), 8, True),
        (torch.zeros(2, 2), 7, False),
        (torch.zeros(1, 2).expand(2, 2), 8, False),
        (torch.zeros(2, 2, device="meta"), 8, False),
    ],
    ids=["fits", "few-operations", "expanded", "another-device"],
)
def test_what_may_be_replayed(x, operations, may, monkeypatch):
    monkeypatch.setattr(replay, "FEWEST_OPERATIONS", 8)
    assert replay.replayable([x], operations) == may


def test_blocks_by_themselves_are_not_replayed():
    block = rf.BasicBlock(8, 8).eval()
    with torch.no_grad():
        for _ in range(6):
            block(torch.randn(1, 8, 5, 5))
    assert [run.replay for run in path_of(block).runs()] == [None]
