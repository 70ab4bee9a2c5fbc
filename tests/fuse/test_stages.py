"""A stage of a fused model: the blocks' kernels in a row, for as long as nothing has changed; else what stock computes then."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.fast_paths import needs_kernels, ops, report, runs
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torchvision.models import resnet

import resnet_fused as rf
from resnet_fused.fusion.path import paths_off
from resnet_fused.fusion.rows import path_of


def projection(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, out, 1, 2, bias=False), nn.BatchNorm2d(out))


KINDS = {
    "basic_block": resnet.BasicBlock,
    "bottleneck": resnet.Bottleneck,
    "our basic_block": rf.BasicBlock,
    "our bottleneck": rf.Bottleneck,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def stage(request, trained) -> nn.Sequential:
    kind = request.param
    planes = 16 // kind.expansion
    blocks = [kind(8, planes, 2, projection(8, 16)), kind(16, planes), kind(16, planes)]
    return rf.fuse(trained(nn.Sequential(*blocks)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 8, 10, 12)


def stock(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with paths_off():
        return stage(x)


def assert_as_stock(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Asserts the result of stock's ops on the stage as it is now, and gives it."""
    twin = copy.deepcopy(stage)  # whose batch norms may move in training mode
    got, want = stage(x), stock(twin, x)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return want


@torch.no_grad()
def test_the_stage_is_served_as_a_whole_and_each_block_by_itself(stage, x):
    want = assert_as_stock(stage, x)
    assert len(runs(stage)) == 1
    assert ops(stage)["basic_block"] + ops(stage)["bottleneck"] == 3
    for block in stage:
        x = block(x)
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert len(runs(stage)) == 4


@pytest.mark.cpu
@needs_kernels
@torch.no_grad()
def test_the_blocks_kernels_run_in_a_row(stage, x):
    x = x.contiguous(memory_format=torch.channels_last)
    first = stage(x)
    (run,) = runs(stage)
    assert len(run.operations) == 1
    assert all(torch.equal(stage(x), first) for _ in range(3))


@torch.no_grad()
def test_other_shapes_and_dtypes_in_between(stage, x):
    inputs = [x, x[:1], torch.randn(2, 8, 7, 5), x.contiguous(memory_format=torch.channels_last)]
    for y in 2 * inputs:
        assert_as_stock(stage, y)
    assert len(runs(stage)) == 4
    with pytest.raises(RuntimeError) as error:
        stock(stage, x.double())
    with pytest.raises(RuntimeError) as ours:
        stage(x.double())
    assert str(ours.value) == str(error.value)
    assert_as_stock(stage, x)


def _replace_parameter(block: nn.Module) -> None:
    block.conv1.weight = nn.Parameter(2 * block.conv1.weight, requires_grad=False)


def _write_into_dict(block: nn.Module) -> None:
    block.bn2._parameters["bias"] = nn.Parameter(block.bn2.bias + 1, requires_grad=False)


def _assign_data(block: nn.Module) -> None:
    block.conv1.weight.data = 2 * block.conv1.weight


def _write_by_numpy(block: nn.Module) -> None:
    weight = block.conv1.weight.detach()
    if weight.device.type == "cpu":
        weight.numpy()[:] *= 2
    else:
        weight.mul_(2)


def _replace_layer(block: nn.Module) -> None:
    block.conv2 = copy.deepcopy(block.conv2)
    block.conv2.weight.mul_(-1)


def _load(block: nn.Module) -> None:
    block.load_state_dict({name: 2 * tensor for name, tensor in block.state_dict().items()})


def _wider(block: nn.Module) -> None:
    block.conv1.kernel_size, block.conv1.padding = (5, 5), (2, 2)
    block.conv1.weight = nn.Parameter(torch.randn(*block.conv1.weight.shape[:2], 5, 5))


CHANGES = {
    "in place": lambda block: block.conv1.weight.mul_(2),
    "statistics in place": lambda block: block.bn1.running_mean.add_(0.5),
    "parameter": _replace_parameter,
    "dict": _write_into_dict,
    "data": _assign_data,
    "numpy": _write_by_numpy,
    "layer": _replace_layer,
    "loaded": _load,
    "eps": lambda block: setattr(block.bn1, "eps", 0.5),
    "kernel": _wider,
    "activation": lambda block: setattr(block, "relu", nn.SiLU()),
    "hook on a layer": lambda block: block.conv1.register_forward_hook(lambda module, args, y: 2 * y),
    "training": lambda block: block.bn1.train(),
    "forward of a layer": lambda block: setattr(block.conv2, "forward", lambda x: 2 * x),
    "bias": lambda block: setattr(block.conv1, "bias", nn.Parameter(torch.ones(block.conv1.out_channels))),
    "dtype and back": lambda block: block.half().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_of_a_block_is_noticed(stage, x, change):
    before = stage(x), stage(x)
    change(stage[1])
    want = assert_as_stock(stage, x)
    assert not torch.equal(want, before[1])
    stage.eval()
    assert_as_stock(stage, x)


@torch.no_grad()
def test_a_change_of_the_stage_is_noticed(stage, x):
    before = stage(x)
    stage[1] = copy.deepcopy(stage[1])
    stage[1].conv1.weight.mul_(2)
    changed = assert_as_stock(stage, x)
    assert not torch.equal(changed, before)
    stage.append(nn.Flatten())
    assert stage(x).dim() == 2
    del stage[3]
    torch.testing.assert_close(stage(x), changed, rtol=1e-4, atol=1e-5)
    assert report(stage).calls_stock == 0


@torch.no_grad()
def test_another_forward_of_the_class_is_noticed(stage, x, monkeypatch):
    before = stage(x)
    monkeypatch.setattr(type(stage[0]), "forward", lambda self, x: x + 1)
    assert torch.equal(stage(x), x + 1 + 1 + 1)
    monkeypatch.undo()
    torch.testing.assert_close(stage(x), before)


@pytest.mark.parametrize("part", [slice(2), slice(1, None), slice(0)], ids=["first", "last", "none"])
@torch.no_grad()
def test_a_slice_of_a_stage(stage, x, part):
    x = stage[: part.start or 0](x)
    assert type(stage[part]) is nn.Sequential
    assert path_of(stage[part]) is None
    assert_as_stock(stage[part], x)


@torch.no_grad()
def test_functional_call_uses_the_parameters_it_is_given(stage, x):
    plain, doubled = stage(x), {name: 2 * tensor for name, tensor in stage.state_dict().items()}
    other = copy.deepcopy(stage)
    other.load_state_dict(doubled)
    for _ in range(2):
        got = torch.func.functional_call(stage, doubled, (x,))
        torch.testing.assert_close(got, stock(other, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(stage(x), plain)


@torch.no_grad()
def test_hooks_of_a_block_are_called(stage, x):
    want, seen = stage(x), []
    inside = stock(stage[:2].eval(), x)
    handles = [
        stage[1].register_forward_pre_hook(lambda module, args: seen.append("pre")),
        stage[1].register_forward_hook(lambda module, args, y: seen.append("post") or outputs.append(y)),
        register_module_forward_pre_hook(lambda module, args: seen.append("all pre") if module is stage[2] else None),
        register_module_forward_hook(lambda module, args, y: seen.append("all post") if module is stage[2] else None),
    ]
    outputs: list[torch.Tensor] = []
    try:
        torch.testing.assert_close(stage(x), want, rtol=1e-4, atol=1e-5)
        assert seen == ["pre", "post", "all pre", "all post"]
        for handle in handles[2:]:
            handle.remove()
        torch.testing.assert_close(stage(x), want, rtol=1e-4, atol=1e-5)
        assert seen[4:] == ["pre", "post"]
    finally:
        for handle in handles:
            handle.remove()
    for y in outputs:
        torch.testing.assert_close(y, inside, rtol=1e-4, atol=1e-5)
        assert y.stride() == inside.stride()
    stage(x)
    assert len(seen) == 6
    assert report(stage).rows[0].op in ("basic_block", "bottleneck")


@torch.no_grad()
def test_a_hook_sees_and_changes_what_a_layer_computes(stage, x):
    """In a model that is served already; all around the layer is fused still."""
    stage(x)
    seen = []
    stage[1].bn1.register_forward_hook(lambda module, args, y: seen.append(args[0]) or y + 1)
    assert_as_stock(stage, x)
    a, b = seen  # the fused model's, and stock's
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert a.stride() == b.stride()
    stage(x)
    assert len(seen) == 3
    assert report(stage).calls_stock == 0


@torch.no_grad()
def test_hooks_in_a_dict_of_ones_own_are_called(stage, x):
    stage(x), stage(x)
    seen = []
    stage[0]._forward_hooks = type(stage[0]._forward_hooks)()
    stage[0].register_forward_hook(lambda module, args, y: seen.append(y))
    stage(x)
    assert len(seen) == 1


@torch.no_grad()
def test_a_forward_of_ones_own_is_called(stage, x):
    stage(x), stage(x)
    stage[2].forward = lambda x: x + 1
    torch.testing.assert_close(stage(x), stage[1](stage[0](x)) + 1)
    del stage[2].forward
    assert_as_stock(stage, x)


def test_derivatives_and_autocast_are_stocks(stage, x):
    grads = []
    for call in (stage, lambda x: stock(stage, x)):
        given = x.clone().requires_grad_()
        call(given).sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = stage(x), stock(stage, x)
    assert got.dtype == want.dtype
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


AGAIN = {"copied": copy.deepcopy, "loaded": lambda net: pickle.loads(pickle.dumps(net))}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
@torch.no_grad()
def test_a_copy_has_kernels_of_its_own(stage, x, again):
    before = stage(x)
    other = again(stage)
    assert type(other) is nn.Sequential
    assert path_of(other) is not path_of(stage) is not None
    other[0].conv1.weight.mul_(2)
    assert torch.equal(stage(x), before)
    assert_as_stock(other, x)
    assert len(runs(other)) == 1


def test_parameters_made_under_inference_mode_are_looked_at_anew(stage, x):
    with torch.inference_mode():
        stage[1].conv1.weight = nn.Parameter(stage[1].conv1.weight.clone(), requires_grad=False)
        before = assert_as_stock(stage, x)
        stage[1].conv1.weight.add_(torch.randn(stage[1].conv1.weight.shape))
        assert not torch.equal(assert_as_stock(stage, x), before)


def test_threads_share_a_stage(stage):
    inputs = [torch.randn(1 + i % 3, 8, 6 + i % 2, 8) for i in range(24)]
    with torch.no_grad():
        want = [copy.deepcopy(stage)(y) for y in inputs]

    @torch.no_grad()
    def run(y: torch.Tensor) -> torch.Tensor:
        return stage(y)

    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, inputs), want, strict=True):
            # On a GPU cuDNN chooses its engines for each thread.
            torch.testing.assert_close(got, wanted, **({"rtol": 1e-4, "atol": 1e-5} if got.is_cuda else {"rtol": 0, "atol": 0}))
    assert report(stage).calls_stock == 0


@torch.no_grad()
def test_blocks_that_are_fused_into_nothing_else_take_turns_with_other_modules(trained, x):
    model = trained(nn.Sequential(rf.BasicBlock(8, 8), nn.Identity(), rf.BasicBlock(8, 8), nn.Dropout(), nn.SiLU()))
    fused = rf.fuse(model)
    assert_as_stock(fused, x)
    assert ops(fused) == {"basic_block": 2}
