"""rf.fuse(…, cuda_graph=True): when calls are captured, replayed, or left alone.

CUDA's graphs are emulated on the CPU, see graph_notes.py.
"""

import contextlib
import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.graph_notes import Notes
from torch import nn

import resnet_fused as rf
from resnet_fused.backends.binding import override_kernels
from resnet_fused.fusion import cuda_graph
from resnet_fused.fusion.cuda_graph import CudaGraphed
from resnet_fused.runtime import capture


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Puts the emulation in CUDA's place, and gives the captures that were made."""
    captures, current = [], [Stream()]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        try:
            yield
        finally:
            del current[current.index(stream) :]

    @contextlib.contextmanager
    def graph(notes, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert stream is current[-1]
        assert not torch.is_autocast_cache_enabled()
        captures.append(notes)
        notes.pool, notes.stream = pool, stream
        current.append(stream)  # which is left current where the capture fails, as by PyTorch
        with notes:
            yield
        current.pop()
        if not notes.operations:
            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)
        notes.spoil()

    fake = SimpleNamespace(
        CUDAGraph=Notes,
        Stream=Stream,
        graph=graph,
        graph_pool_handle=lambda: (0, len(captures)),
        current_stream=lambda device=None: current[-1],
        current_device=lambda: None,
        stream=on,
        device=lambda device: contextlib.nullcontext(),
        is_available=lambda: False,
        streams=current,
    )
    capture.stream_of.cache_clear()
    monkeypatch.setattr(cuda_graph.torch, "cuda", fake)
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda index, pool: captures[-1].__dict__.update(ended=pool), False
    )
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: captures[-1].__dict__.update(freed=pool), False)
    yield captures
    assert len(current) == 1
    capture.stream_of.cache_clear()


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def graphed(model):
    with torch.no_grad():
        yield CudaGraphed(model)


def image(size=6):
    return torch.randn(1, 3, size, size)


def test_captures_at_the_second_call_and_replays_with_each_input(graphed, model, emulated):
    for count in (0, 1, 1, 1):
        x = image()
        torch.testing.assert_close(graphed(x), model(x))
        assert len(emulated) == count


def test_a_result_stays_as_it_was_when_the_next_call_comes(graphed, model):
    inputs = [image() for _ in range(4)]
    results = [graphed(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, model(x))


def test_the_input_is_neither_kept_nor_changed(graphed):
    x = image()
    before = x.clone()
    first, *_ = [graphed(x) for _ in range(3)]
    x.zero_()
    assert torch.equal(graphed(before), first)
    assert not torch.equal(graphed(x), first)


def test_each_kind_of_input_has_its_graph(graphed, model, emulated):
    kinds = [image(6), image(7), image(6).to(memory_format=torch.channels_last)]
    for _ in range(3):
        for x in kinds:
            torch.testing.assert_close(graphed(x), model(x))
    assert len(emulated) == 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model[0].weight.mul_(2), id="parameter-in-place"),
        pytest.param(lambda model: setattr(model[0], "bias", nn.Parameter(torch.ones(4))), id="new-parameter"),
        pytest.param(lambda model: model[1].running_mean.add_(1), id="buffer-in-place"),
        pytest.param(lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}), id="loaded"),
    ],
)
def test_a_change_of_the_model_is_seen(change, graphed, model):
    x = image()
    for _ in range(3):
        graphed(x)
    change(model)
    for _ in range(3):
        torch.testing.assert_close(graphed(x), model(x))


def test_changed_settings_are_seen(graphed, model, emulated):
    x = image()
    for _ in range(2):
        graphed(x)
    with rf.use_backend("reference"):
        graphed(x)
        graphed(x)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert graphed(x).dtype == model(x).dtype
    assert len(emulated) == 3


def test_nothing_is_captured_while_the_kernels_are_changed_from_call_to_call(graphed, model, emulated):
    x = image()
    with override_kernels(lambda problem, folded: None):
        for _ in range(3):
            torch.testing.assert_close(graphed(x), model(x))
    assert not emulated
    for _ in range(2):
        graphed(x)
    assert len(emulated) == 1


LEFT_ALONE = {
    "a derivative": lambda graphed: graphed(image().requires_grad_()).sum().backward(),
    "training": lambda graphed: graphed.train()(image()),
    "expanded": lambda graphed: graphed(image()[:, :1].expand(1, 3, 6, 6)),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in LEFT_ALONE.items()])
def test_runs_as_it_is(call, graphed, emulated):
    with torch.enable_grad():
        for _ in range(3):
            call(graphed)
    assert not emulated


def test_hooks_go_on_running(graphed, model, emulated):
    seen = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    for _ in range(3):
        graphed(image())
    assert len(seen) == 3
    assert not emulated
    handle.remove()
    for _ in range(3):
        graphed(image())
    assert len(emulated) == 1


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x * 3


def test_what_can_not_be_captured_runs_on_and_says_so_once(caplog):
    graphed = CudaGraphed(Branching().eval())
    with caplog.at_level(logging.WARNING, "resnet_fused"), torch.no_grad():
        for value in (1.0, 1.0, -1.0, 1.0):
            assert graphed(torch.full((2,), value)).tolist() == [2.0 * value if value > 0 else 3.0 * value] * 2
    assert caplog.text.count("can't be captured") == 1
    assert "Branching" in caplog.text


def test_a_failed_capture_leaves_no_pool_open(emulated):
    class Waits(nn.Module):
        def forward(self, x):
            return x * x.sum().item() if emulated else x * 2

    graphed = CudaGraphed(Waits().eval())
    with torch.no_grad():
        for _ in range(3):
            graphed(torch.ones(2))
    (failed,) = emulated
    assert failed.ended == failed.freed == failed.pool


def test_a_graph_of_nothing_is_refused(emulated, caplog):
    graphed, x = CudaGraphed(nn.Identity().eval()), image()
    with torch.no_grad():
        assert all(graphed(x) is x for _ in range(4))
    assert len(emulated) == 1
    assert "nothing is launched on the GPU" in caplog.text


def test_an_input_that_is_changed_in_place_is_the_callers(emulated):
    graphed = CudaGraphed(nn.ReLU(inplace=True).eval())
    with torch.no_grad():
        for _ in range(4):
            x = torch.full((2,), -1.0)
            assert graphed(x) is x
            assert x.tolist() == [0.0, 0.0]
    assert not emulated


def test_captures_of_a_device_share_a_stream_of_it(graphed, emulated):
    for size in (4, 5):
        for _ in range(2):
            graphed(image(size))
    first, second = emulated
    assert first.stream is second.stream
    assert first.stream.device == torch.device("cpu")


def test_more_kinds_of_input_than_graphs_are_captured_less_and_less_often(graphed, emulated):
    rounds = 200
    for _ in range(rounds):
        for size in range(3, 23):
            graphed(torch.empty(1, 3, size, 3))
    assert len(emulated) < 80
    assert graphed.extra_repr() == "graphs=16"


def test_a_replay_looks_at_the_model_in_one_flat_way(graphed, model, monkeypatch):
    x = image()
    for _ in range(3):
        graphed(x)
    monkeypatch.setattr(cuda_graph, "state_of", lambda model: pytest.fail("it was looked at module by module"))
    expected = model(x)
    for _ in range(3):
        torch.testing.assert_close(graphed(x), expected)


def test_another_module_without_parameters_is_seen(graphed, model):
    x = image()
    for _ in range(3):
        graphed(x)
    model[2] = nn.Tanh().eval()
    torch.testing.assert_close(graphed(x), model(x))
    model.append(nn.Sigmoid().eval())
    torch.testing.assert_close(graphed(x), model(x))


def test_keeps_no_more_graphs_than_it_may(graphed, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    for size in (4, 5, 6):
        for _ in range(2):
            graphed(image(size))
    assert graphed.extra_repr() == "graphs=2"


def test_nested_results_and_keyword_arguments_keep_their_form():
    class Nested(nn.Module):
        def forward(self, x, *, factor, labels=None):
            return {"a": x * factor, "rest": [x + 1, "text"]}

    graphed = CudaGraphed(Nested().eval())
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3)
            y = graphed(x, factor=2)
            assert torch.equal(y["a"], x * 2)
            assert torch.equal(y["rest"][0], x + 1)
            assert y["rest"][1] == "text"
        assert torch.equal(graphed(x, factor=3)["a"], x * 3)


def test_attributes_of_the_model_are_within_reach(graphed, model):
    assert graphed.append == model.append
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = graphed.nothing_like_it


def test_copies_start_without_graphs(graphed, model):
    x = image()
    for _ in range(3):
        graphed(x)
    twin = copy.deepcopy(graphed)
    assert twin.extra_repr() == "graphs=0"
    torch.testing.assert_close(twin(x), model(x))


def test_a_fused_network_is_captured_whole(emulated):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), rf.BasicBlock(8, 8)).eval()
    graphed = CudaGraphed(rf.fuse(model))
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 8, 5, 5)
            torch.testing.assert_close(graphed(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(emulated) == 1


def test_state_dicts_have_the_keys_of_the_plain_model(graphed, model):
    state = graphed.state_dict()
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata
    changed = {name: value + 1 for name, value in state.items()}
    x = image()
    before = [graphed(x) for _ in range(3)][-1]
    assert not any(graphed.load_state_dict(changed))
    assert torch.equal(model[0].weight, changed["0.weight"])
    assert not torch.allclose(graphed(x), before)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        graphed.load_state_dict({name: value for name, value in state.items() if name != "0.weight"})


def test_state_dicts_of_a_larger_model_have_the_keys_of_the_plain_one(graphed, model):
    plain = nn.Sequential(copy.deepcopy(model), nn.Flatten())
    whole = nn.Sequential(graphed, nn.Flatten())
    assert list(whole.state_dict(prefix="net.")) == [f"net.{name}" for name in plain.state_dict()]
    state = {name: value + 1 for name, value in plain.state_dict().items()}
    assert not any(whole.load_state_dict(state))
    assert torch.equal(model[0].weight, state["0.0.weight"])
    found = whole.load_state_dict({**state, "0.other": torch.ones(1)}, strict=False)
    assert found.missing_keys == []
    assert len(found.unexpected_keys) == 1
