"""Writes to parameters that no version counter tells of: by `.data`, by numpy, by another process."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends import library
from resnet_fused.backends.watch import Watch


@pytest.fixture(params=["native", "python"], autouse=True)
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(library, "load", lambda name: "not built")
        monkeypatch.setattr("resnet_fused.backends.watch._SHARE", float("inf"))  # every call looks, however fast it comes


def parameters() -> list[torch.Tensor]:
    """Some of a model's, of all sizes that are treated differently."""
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(512, 64, 1, 1)),
        nn.Parameter(torch.randn(1000)),
        torch.rand(64),
        nn.Parameter(torch.randn(5)),
        torch.tensor(0),
        torch.tensor(1.5),
    ]


def noticed(watch: Watch) -> bool:
    """Within the calls that the class promises."""
    return not all(watch.unchanged() for _ in range(watch.calls))


def set_data(t: torch.Tensor) -> None:
    t.data = t.detach().clone()


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "mul": lambda t: t.data.mul_(0.5) if t.is_floating_point() else t.data.add_(1),
    "copy": lambda t: t.data.copy_(torch.full_like(t, 7)),
    "another tensor": set_data,
    "numpy": lambda t: t.detach().numpy().fill(3),
}


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("write", WRITES.values(), ids=[*WRITES])
def test_a_write_to_all_of_a_tensor_is_noticed_at_once(index: int, write: Callable[[torch.Tensor], object]):
    tensors = parameters()
    watch = Watch(tensors)
    if not tensors[index].is_floating_point():
        tensors[index].data.add_(0)
    assert watch.unchanged()
    version = tensors[index]._version
    write(tensors[index])
    assert tensors[index]._version == version
    assert not watch.unchanged()
    assert not watch.unchanged()


def test_nothing_is_noticed_where_nothing_changed():
    watch = Watch(parameters())
    assert all(watch.unchanged() for _ in range(10 * watch.calls))


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("place", [0.0, 0.3, 0.77, 1.0])
def test_one_element_is_noticed_within_the_calls_promised(index: int, place: float):
    tensors = parameters()
    watch = Watch(tensors)
    flat = tensors[index].detach().permute(0, 2, 3, 1).flatten() if index == 0 else tensors[index].detach().flatten()
    flat.numpy()[int(place * (flat.numel() - 1))] += 1
    assert noticed(watch)
    assert not watch.unchanged()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.complex64, torch.bool]
)
def test_dtypes(dtype: torch.dtype):
    t = torch.ones(70, 30).to(dtype)
    watch = Watch([t])
    assert all(watch.unchanged() for _ in range(3 * watch.calls))
    t.data.zero_()
    assert not watch.unchanged()
    watch = Watch([t])
    t.data[69, 29] = 1
    assert noticed(watch)


def test_nan_is_no_change_but_another_nan_is():
    t = torch.full((5000,), float("nan"))
    watch = Watch([t])
    assert all(watch.unchanged() for _ in range(3 * watch.calls))
    t.view(torch.int32).numpy()[:] ^= 1
    assert t.isnan().all()
    assert not watch.unchanged()


def test_signs_of_all_elements_change_a_part():
    """What a checksum of sums and products may lose: an even number of highest bits. Here only the checksums see it."""
    t = torch.ones(40_000)
    watch = Watch([t])
    t.data[:2000].neg_()
    t.data[3000:4000].neg_()
    assert noticed(watch)


def test_pruned_weights_multiplied():
    t = torch.zeros(100_000)
    t[::40] = 1
    watch = Watch([t])
    t.data.mul_(2)
    assert not watch.unchanged()


def test_tensors_without_elements_or_memory():
    empty = torch.empty(0, 64)
    watch = Watch([empty, torch.empty(3, 0), torch.ones(3, device="meta"), torch.eye(3).to_sparse()])
    assert watch.calls == 0
    assert watch.unchanged()
    empty.data = torch.empty(64, 0)
    assert watch.unchanged()
    assert Watch([]).unchanged()


def test_a_storage_that_was_taken_away_is_not_read():
    t = torch.ones(100_000)
    watch = Watch([t])
    t.untyped_storage().resize_(0)
    assert not watch.unchanged()
    assert Watch([t]).unchanged()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_other_kinds():
    kinds = [
        torch.randn(2, 8, 4, 4).to_mkldnn(),
        nn.parameter.UninitializedParameter(),
        torch.nested.nested_tensor([torch.ones(3)]),
    ]
    with torch._subclasses.FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds.append(torch.ones(3))
    t = torch.ones(3)
    watch = Watch([*kinds, t])
    assert watch.unchanged()
    t.data.zero_()
    assert not watch.unchanged()


class Subclass(nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_without_a_dispatch_of_their_own_are_like_tensors():
    t = Subclass(torch.ones(300))
    watch = Watch([t])
    assert watch.unchanged()
    t.data.mul_(2)
    assert not watch.unchanged()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda t: t[::2],
    "columns": lambda t: t[:, 3:9],
    "one column": lambda t: t[:, 5],
    "every other element": lambda t: t[1::2, 1::2],
    "transposed": lambda t: t[:100, 8:24].t(),
    "four dimensions": lambda t: t.view(25, 8, 4, 8)[:, 1:5, 1:3, 2:5],
    "expanded": lambda t: t[3].expand(50, 32),
    "expanded, apart": lambda t: t[:, :1].expand(-1, 40),
    "overlapping": lambda t: t.as_strided((100, 6), (4, 1), 40),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=[*VIEWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex128])
def test_views(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype):
    """Of a view its elements count, each of them, and not what lies between."""
    whole = torch.arange(200 * 32).to(dtype)
    seen = view(whole.view(200, 32))
    inside = view(torch.arange(200 * 32).view(200, 32)).unique()
    outside = torch.ones(200 * 32, dtype=torch.bool)
    outside[inside] = False
    watch = Watch([seen])
    whole.data[outside] = 1
    assert all(watch.unchanged() for _ in range(2 * watch.calls))
    for place in (inside[0], inside[len(inside) // 2], inside[-1]):
        watch = Watch([seen])
        whole.data[place] = 77 if whole[place] != 77 else 78
        assert noticed(watch)


def _poke(t: torch.Tensor, index: int) -> None:
    t[index] = 5


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_write_by_another_process():
    shared = torch.zeros(50_000).share_memory_()
    watch = Watch([shared])
    assert watch.unchanged()
    child = multiprocessing.get_context("fork").Process(target=_poke, args=(shared, 41_111))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert noticed(watch)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(mode: Callable[[], torch.no_grad]):
    outside = torch.ones(5000, requires_grad=True)
    with mode():
        inside = torch.ones(5000)
        watch = Watch([outside, inside])
        assert all(watch.unchanged() for _ in range(watch.calls))
        outside.data.mul_(2)
        assert not watch.unchanged()
        watch = Watch([outside, inside])
        inside.data.mul_(2)
        assert not watch.unchanged()


class Operators(TorchDispatchMode):
    """Notes the operators that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_no_mode_sees_it():
    tensors = parameters()
    with Operators() as operators:
        watch = Watch(tensors)
        watch.unchanged()
        del watch
        gc.collect()
    assert not operators.seen


def test_threads():
    tensors = [torch.randn(300_000), *parameters()]
    watch = Watch(tensors)
    answers: list[bool] = []

    def ask() -> None:
        for _ in range(2000):
            answers.append(watch.unchanged())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8000
    assert all(answers)
    tensors[0].data[123_456] += 1
    assert noticed(watch)


def test_a_watch_deleted_while_others_ask():
    library_ops = torch.ops.resnet_fused_cpu
    id = library_ops.new_watch([torch.randn(1_000_000)])
    outcomes: list[str] = []

    def ask() -> None:
        try:
            while True:
                assert library_ops.watch_unchanged(id)
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    library_ops.delete_watch(id)
    for thread in threads:
        thread.join()
    assert [f"watch is {id}" in outcome for outcome in outcomes] == [True] * 3
    library_ops.delete_watch(id)


def test_tensors_go_with_the_watch():
    t = torch.ones(100)
    watch = Watch([t])
    before = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    keeper, t = t.detach(), None
    del watch, t
    gc.collect()
    assert torch._C._storage_Use_Count(keeper.untyped_storage()._cdata) <= before
