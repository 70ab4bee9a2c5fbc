"""A stage of a fused model: the blocks' kernels in a row, for as long as nothing has changed; else nn.Sequential."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import resnet_fused as rf
from resnet_fused.modules import FusedBlock
from resnet_fused.modules.sequential import FusedSequential


def stage_of(kind: type[rf.BasicBlock] | type[rf.Bottleneck] = rf.BasicBlock) -> FusedSequential:
    torch.manual_seed(0)
    planes = 16 // kind.expansion
    stage = rf.fuse(nn.Sequential(nn.Sequential(kind(8, planes, stride=2), kind(16, planes), kind(16, planes))).eval())[0]
    assert type(stage) is FusedSequential
    return stage


@pytest.fixture(params=[rf.BasicBlock, rf.Bottleneck], ids=["basic_block", "bottleneck"])
def stage(request) -> FusedSequential:
    return stage_of(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 8, 10, 12)


@pytest.fixture
def forwards(monkeypatch) -> list[nn.Module]:
    """The blocks whose forward was called."""
    called = []
    forward = FusedBlock.forward
    monkeypatch.setattr(FusedBlock, "forward", lambda self, x: called.append(self) or forward(self, x))
    return called


def one_by_one(stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return nn.Sequential(*copy.deepcopy(stage))(x)


@torch.no_grad()
def test_the_blocks_kernels_run_without_the_blocks(stage, x, forwards):
    want = one_by_one(stage, x)
    forwards.clear()
    assert all(torch.equal(stage(x), want) for _ in range(3))
    assert isinstance(stage, nn.Sequential)
    assert not forwards


@torch.no_grad()
def test_other_shapes_and_dtypes_in_between(stage, x, forwards):
    inputs = [x, x[:1], torch.randn(2, 8, 7, 5), x.contiguous(memory_format=torch.channels_last)]
    for y in 2 * inputs:
        assert torch.equal(stage(y), one_by_one(stage, y))
    forwards.clear()
    for y in inputs:
        stage(y)
    assert not forwards
    with pytest.raises(ValueError, match="float64"):
        stage(x.double())


def _replace_parameter(block: FusedBlock) -> None:
    block.conv1.weight = nn.Parameter(2 * block.conv1.weight, requires_grad=False)


def _write_into_dict(block: FusedBlock) -> None:
    block.conv2._parameters["shift"] = nn.Parameter(block.conv2.shift + 1, requires_grad=False)


def _assign_data(block: FusedBlock) -> None:
    block.conv1.weight.data = 2 * block.conv1.weight


def _replace_layer(block: FusedBlock) -> None:
    block.conv2 = copy.deepcopy(block.conv2)
    block.conv2.weight.mul_(-1)


def _load(block: FusedBlock) -> None:
    block.load_state_dict({name: 2 * tensor for name, tensor in block.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [lambda block: block.conv1.weight.mul_(2), _replace_parameter, _write_into_dict, _assign_data, _replace_layer, _load],
    ids=["in place", "parameter", "dict", "data", "layer", "loaded"],
)
@torch.no_grad()
def test_a_change_of_a_block_is_noticed(stage, x, change):
    before = stage(x), stage(x)
    change(stage[1])
    want = one_by_one(stage, x)
    assert not torch.equal(want, before[1])
    assert torch.equal(stage(x), want)


@torch.no_grad()
def test_a_change_of_the_stage_is_noticed(stage, x):
    before = stage(x)
    stage[1] = copy.deepcopy(stage[1])
    stage[1].conv1.weight.mul_(2)
    changed = stage(x)
    assert torch.equal(changed, one_by_one(stage, x))
    assert not torch.equal(changed, before)
    stage.append(nn.Flatten())
    assert stage(x).dim() == 2
    del stage[3]
    assert torch.equal(stage(x), changed)


@pytest.mark.parametrize("part", [slice(2), slice(1, None), slice(0)], ids=["first", "last", "none"])
@torch.no_grad()
def test_a_slice_of_a_stage(stage, x, part):
    x = stage[: part.start or 0](x)
    assert torch.equal(stage[part](x), one_by_one(stage[part], x))


@torch.no_grad()
def test_functional_call_uses_the_parameters_it_is_given(stage, x):
    plain, doubled = stage(x), {name: 2 * tensor for name, tensor in stage.state_dict().items()}
    assert not torch.equal(torch.func.functional_call(stage, doubled, (x,)), plain)
    assert torch.equal(stage(x), plain)


@torch.no_grad()
def test_hooks_of_a_block_are_called(stage, x):
    want, seen = stage(x), []
    handles = [
        stage[1].register_forward_pre_hook(lambda module, args: seen.append("pre")),
        stage[1].register_forward_hook(lambda module, args, y: seen.append("post")),
        register_module_forward_pre_hook(lambda module, args: seen.append("all pre") if module is stage[2] else None),
        register_module_forward_hook(lambda module, args, y: seen.append("all post") if module is stage[2] else None),
    ]
    try:
        assert torch.equal(stage(x), want)
        assert seen == ["pre", "post", "all pre", "all post"]
    finally:
        for handle in handles:
            handle.remove()
    stage(x)
    assert len(seen) == 4


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
    assert torch.equal(stage(x), stage[1](stage[0](x)) + 1)


def test_derivatives_and_autocast_are_the_blocks_own(stage, x, forwards):
    x.requires_grad_()
    stage(x).sum().backward()
    assert x.grad is not None
    assert [*forwards] == [*stage]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert stage(x).dtype == torch.bfloat16


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copied", "loaded"])
@torch.no_grad()
def test_a_copy_has_kernels_of_its_own(stage, x, again):
    before = stage(x)
    other = again(stage)
    assert type(other) is FusedSequential
    other[0].conv1.weight.mul_(2)
    assert torch.equal(stage(x), before)
    assert torch.equal(other(x), one_by_one(other, x))


def test_parameters_made_under_inference_mode_are_looked_at_anew(stage, x):
    with torch.inference_mode():
        stage[1].conv1.weight = nn.Parameter(stage[1].conv1.weight.clone(), requires_grad=False)
        before = stage(x)
        stage[1].conv1.weight.mul_(2)
        assert not torch.equal(stage(x), before)


def test_threads_share_a_stage(stage):
    inputs = [torch.randn(1 + i % 3, 8, 6 + i % 2, 8) for i in range(24)]
    with torch.no_grad():
        want = [one_by_one(stage, y) for y in inputs]

    @torch.no_grad()
    def run(y: torch.Tensor) -> torch.Tensor:
        return stage(y)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, inputs), want))


def test_stages_of_other_modules_are_left_alone():
    model = nn.Sequential(rf.BasicBlock(8, 8), rf.BasicBlock(8, 8), nn.Identity()).eval()
    assert type(rf.fuse(model)) is nn.Sequential
