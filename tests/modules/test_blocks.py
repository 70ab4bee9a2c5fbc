"""rf.BasicBlock and rf.Bottleneck as drop-ins for torchvision's: constructor, keys, results, and a folded path never stale."""

from __future__ import annotations

import copy
import inspect
import pickle
import types

import pytest
import torch
import torchvision
from support.tolerances import FLOOR, assert_as_good_as_stock, relative_error
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion.path import paths_off
from resnet_fused.fusion.rows import path_of

TV = torchvision.models.resnet
PAIRS = [(rf.BasicBlock, TV.BasicBlock), (rf.Bottleneck, TV.Bottleneck)]


def _pair(ours, theirs, trained, **kwargs):
    """Our block and torchvision's with the same weights; torchvision's gets the projection that ours makes by itself."""
    inplanes, planes, stride = kwargs.pop("inplanes", 64), kwargs.pop("planes", 16), kwargs.pop("stride", 1)
    mine = trained(ours(inplanes, planes, stride, **kwargs))
    downsample = copy.deepcopy(mine.downsample)
    other = theirs(inplanes, planes, stride, downsample, **kwargs).eval()
    other.load_state_dict(mine.state_dict())
    return mine, other


VARIANTS = {
    "basic-identity": (*PAIRS[0], {"planes": 64}),
    "basic-channels": (*PAIRS[0], {"planes": 32}),
    "basic-stride": (*PAIRS[0], {"planes": 64, "stride": 2}),
    "bottleneck-identity": (*PAIRS[1], {"planes": 16}),
    "bottleneck-stride": (*PAIRS[1], {"planes": 32, "stride": 2}),
    "bottleneck-groups": (*PAIRS[1], {"planes": 64, "groups": 32, "base_width": 4}),
    "bottleneck-dilation": (*PAIRS[1], {"planes": 16, "dilation": 2}),
    "bottleneck-frozen": (*PAIRS[1], {"planes": 16, "norm_layer": torchvision.ops.FrozenBatchNorm2d}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("ours, theirs, kwargs", VARIANTS.values(), ids=VARIANTS)
def test_inference_is_as_good_as_torchvision(ours, theirs, kwargs, layout, trained):
    mine, other = _pair(ours, theirs, trained, **kwargs)
    x = torch.randn(2, 64, 9, 7).contiguous(memory_format=layout)
    truth = copy.deepcopy(other).double()(x.double()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, want = mine(x), other(x)
        path = path_of(mine)
        assert path is not None
        assert path.reason == "", "the fast path was not taken"
        (run,) = path.runs()
        assert [problem.label for problem, _ in run.problems.values()] == [mine.op]
        assert_as_good_as_stock(y, want, truth)
        assert y.stride() == want.stride()


@pytest.mark.parametrize("ours, theirs, kwargs", VARIANTS.values(), ids=VARIANTS)
def test_eval_with_grad_is_differentiable(ours, theirs, kwargs, trained):
    mine, other = _pair(ours, theirs, trained, **kwargs)
    truth = copy.deepcopy(other).double()
    x = torch.randn(2, 64, 9, 7)
    grads = []
    for block in (mine, other, truth):
        given = x.detach().clone().to(next(block.parameters()).dtype).requires_grad_()
        block(given).square().mean().backward()
        grads.append([given.grad, *(p.grad for _, p in sorted(block.named_parameters()))])
    for ours_grad, stock_grad, exact in zip(*grads, strict=True):
        assert_as_good_as_stock(ours_grad, stock_grad, exact)


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=["basic", "bottleneck"])
def test_constructor_and_state_dict_are_torchvisions(ours, theirs):
    names = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters)[: len(names)] == names
    mine = torchvision.models.ResNet(ours, [1, 1, 1, 1], num_classes=10)
    other = torchvision.models.ResNet(theirs, [1, 1, 1, 1], num_classes=10)
    assert list(mine.state_dict()) == list(other.state_dict())
    mine.load_state_dict(other.state_dict())
    other.load_state_dict(mine.state_dict())
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(mine.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=["basic", "bottleneck"])
def test_torchvision_takes_a_block_for_its_own(ours, theirs):
    """Its ResNet asks isinstance to find the batch norms that begin at 0; nothing else of its classes is used."""
    assert isinstance(ours(64, 16), theirs)
    mine = torchvision.models.ResNet(ours, [1, 1, 1, 1], num_classes=3, zero_init_residual=True)
    other = torchvision.models.ResNet(theirs, [1, 1, 1, 1], num_classes=3, zero_init_residual=True)
    zero = [name for name, p in other.named_parameters() if "bn" in name and name.endswith("weight") and not p.any()]
    assert len(zero) == 4
    assert [name for name, p in mine.named_parameters() if "bn" in name and name.endswith("weight") and not p.any()] == zero


def test_stride_always_gets_a_projection():
    assert rf.BasicBlock(64, 64, stride=2).downsample is not None
    assert rf.Bottleneck(64, 16, stride=2).downsample is not None
    assert rf.BasicBlock(64, 64).downsample is None


def _stock(block, x):
    with paths_off():
        return block(x)


def _scale(block):
    with torch.no_grad():
        block.conv1.weight.mul_(1.5)


def _statistics(block):
    block.bn1.running_mean.add_(0.5)


def _train_step(block):
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(4, 16, 6, 6)).sum().backward()
    optimizer.step()
    block.eval()


def _replace(block):
    block.bn2 = nn.BatchNorm2d(16).eval()


CHANGES = {
    "parameter-in-place": _scale,
    "buffer-in-place": _statistics,
    "load_state_dict": lambda block: block.load_state_dict({k: v + 0.1 for k, v in block.state_dict().items()}),
    "cast-and-back": lambda block: block.bfloat16().float(),
    "training-step": _train_step,
    "layer-replaced": _replace,
    "data-replaced": lambda block: setattr(block.conv1.weight, "data", block.conv1.weight.data * 2),
    "numpy": lambda block: block.conv1.weight.detach().numpy().__imul__(2),
    "eps": lambda block: setattr(block.bn1, "eps", 0.7),
    "activation": lambda block: setattr(block, "relu", nn.SiLU()),
    "shortcut": lambda block: setattr(block, "downsample", nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)).eval()),
    "forward-of-a-layer": lambda block: setattr(block.conv2, "forward", lambda x: 2 * x),
    "hook-on-the-activation": lambda block: block.relu.register_forward_hook(lambda m, args, y: y * 2),
    "hook-added": lambda block: block.conv1.register_forward_hook(lambda m, args, y: y * 2),
    "bn-back-to-training": lambda block: block.bn1.train(),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name, marks=pytest.mark.cpu if name == "numpy" else ()) for name, change in CHANGES.items()],
)
def test_folded_path_is_never_stale(change, trained):
    block = trained(rf.BasicBlock(16, 16))
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        before = block(x)
    change(block)
    with torch.no_grad():
        # Twins, since a batch norm in training mode changes its statistics at every call.
        want = _stock(copy.deepcopy(block), x)
        assert relative_error(block(x), want.double()) < FLOOR[torch.float32]
    assert not torch.allclose(before, want), "the change had no effect, so the test proves nothing"


def test_parameters_made_under_inference_mode_are_not_kept():
    with torch.inference_mode():
        block = rf.BasicBlock(16, 16).eval()
        x = torch.randn(1, 16, 5, 5)
        first = block(x)
        block.conv1.weight.mul_(3)
        second = block(x)
        torch.testing.assert_close(second, _stock(block, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, second)


def test_autocast(trained):
    mine, other = _pair(*PAIRS[1], trained)
    x = torch.randn(2, 64, 8, 8)
    truth = copy.deepcopy(other).double()(x.double()).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_as_good_as_stock(mine(x), other(x), truth)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("ours, theirs", PAIRS, ids=["basic", "bottleneck"])
def test_meta_tensors(ours, theirs, memory_efficient):
    """Shapes of large models are tried out on the meta device, in training and inference, with autocast on elsewhere too."""
    with torch.device("meta"):
        mine, other = ours(64, 64 // ours.expansion), theirs(64, 64 // ours.expansion)
        x = torch.empty(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    mine.memory_efficient = memory_efficient
    for training in (True, False):
        mine.train(training), other.train(training)
        for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                y, want = mine(x), other(x)
            assert (y.shape, y.stride(), y.dtype, y.device) == (want.shape, want.stride(), want.dtype, want.device)
        mine(x).sum().backward()
        assert all(p.grad is not None for p in mine.parameters())


@pytest.mark.cpu
@pytest.mark.parametrize("ours, theirs", PAIRS, ids=["basic", "bottleneck"])
def test_inputs_in_onednn_layout_run_as_in_torchvision(ours, theirs, trained):
    mine, other = _pair(ours, theirs, trained, planes=64 // ours.expansion)
    x = torch.randn(2, 64, 8, 8)
    given = x.to_mkldnn()
    truth = copy.deepcopy(other).double()(x.double())
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            y, want = mine(given), other(given)
        assert y.layout == want.layout == torch._mkldnn
        assert_as_good_as_stock(y.to_dense(), want.to_dense(), truth)
    mine.train(), other.train()
    for memory_efficient in (False, True):
        mine.memory_efficient = memory_efficient
        with torch.no_grad():
            torch.testing.assert_close(mine(given).to_dense(), other(given).to_dense())
    for a, b in zip(mine.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_pickles_leave_the_folded_parameters_behind(trained):
    block = trained(rf.Bottleneck(16, 4))
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        want = block(x)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert not path_of(other).runs()
            assert torch.equal(other(x), want)
            assert path_of(other).module is other
            other.conv1.weight.mul_(2)
            assert not torch.allclose(other(x), want)
            assert torch.equal(block(x), want)
        shallow = copy.copy(block)
        assert torch.equal(shallow(x), want)
        assert path_of(shallow).module is shallow
        assert torch.equal(block(x), want)
    assert list(block.state_dict()) == list(rf.Bottleneck(16, 4).state_dict())
    assert repr(block) == repr(rf.Bottleneck(16, 4))


@pytest.mark.parametrize("called", [False, True], ids=["never-called", "called"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_without_a_graph_break(called, training, trained):
    block = trained(rf.Bottleneck(16, 4))
    other = trained(rf.Bottleneck(16, 4))
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 5, 5)
    if called:
        with torch.no_grad():
            block(x)
    block.train(training), other.train(training)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.set_grad_enabled(training):
        want = _stock(other, x)
        got = torch.compile(block, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ("resnet_fused.program.default" in targets) == (called and not training)
    for a, b in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kwargs", [{"groups": 2}, {"base_width": 128}, {"dilation": 2}], ids=str)
def test_basic_block_says_what_it_cannot_do(kwargs):
    with pytest.raises(ValueError, match="Use Bottleneck"):
        rf.BasicBlock(16, 16, **kwargs)


def test_shortcuts_and_activations_that_users_put_in(trained):
    """Another shortcut, padding mode or activation is not what the block's op computes: its own modules run."""
    x = torch.randn(2, 16, 6, 6)
    pooled = rf.BasicBlock(16, 16, 2, downsample=nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(16)))
    circular = rf.BasicBlock(16, 16)
    circular.conv2.padding_mode = "circular"
    circular.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    silu = rf.BasicBlock(16, 16)
    silu.relu = nn.SiLU()
    for block in (pooled, circular, silu):
        trained(block)
        with torch.no_grad():
            want = block.relu(
                block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
                + (x if block.downsample is None else block.downsample(x))
            )
            torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)


def _halved(self, x):
    return type(self).forward(self, x) * 0.5


PARTS = {
    "shortcut": "downsample",
    "shortcuts-convolution": "downsample.0",
    "convolution": "conv1",
    "norm": "bn2",
    "activation": "relu",
}


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_forward_of_its_own_put_into_a_part_is_called(part, fuse_first, trained):
    block = trained(rf.BasicBlock(8, 16, 2))
    other = copy.deepcopy(block)
    if fuse_first:
        block = rf.fuse(block)
    for each in (block, other):
        module = each.get_submodule(part)
        module.forward = types.MethodType(_halved, module)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(block(x), other.plain_forward(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(x), other.plain_forward(x), rtol=1e-5, atol=1e-5)
    block.train(), other.train()
    torch.testing.assert_close(block(x), other.plain_forward(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_a_hooked_activation_sees_what_it_sees_in_torchvisions_block(name):
    """Under autocast the shortcut may be float32 and the main path bfloat16."""
    x = torch.randn(2, 16, 6, 6)
    dtypes = []
    for module in (getattr(rf, name), getattr(TV, name)):
        block = module(16, 16 if name == "BasicBlock" else 4).eval()
        block.relu.register_forward_pre_hook(lambda m, args: dtypes.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]
