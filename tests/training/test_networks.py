"""Training of whole networks and blocks made of our blocks, beside the same ones of torchvision's."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.tolerances import assert_as_good_as_stock
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

import resnet_fused as rf

CL = torch.channels_last
THEIRS = {rf.BasicBlock: resnet.BasicBlock, rf.Bottleneck: resnet.Bottleneck}
LAYERS = {rf.BasicBlock: [2, 2, 2, 2], rf.Bottleneck: [3, 4, 6, 3]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks here are small: on a busy machine threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(block: type, layers: list[int]) -> nn.Module:
    torch.manual_seed(1)
    # A quarter of ResNet-50's width in its bottlenecks: the depth is what matters here, and with all of its parameters half of
    # the time would go to the optimizer.
    width = 16 if block in (rf.Bottleneck, resnet.Bottleneck) else 64
    model = torchvision.models.ResNet(block, layers, num_classes=10, width_per_group=width)
    return model.to(memory_format=CL).train()


def pair(block: type, layers: list[int]) -> tuple[nn.Module, nn.Module]:
    """The same network of our blocks and of torchvision's."""
    ours, theirs = network(block, layers), network(THEIRS[block], layers)
    for module in ours.modules():
        if isinstance(module, rf.BasicBlock | rf.Bottleneck):
            # Weak residual branches, as trained networks have them: otherwise rounding errors grow from block to block.
            nn.init.constant_(getattr(module, "bn3", module.bn2).weight, 0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, size, size).contiguous(memory_format=CL), torch.arange(count) % 10


def loss_curve(model: nn.Module, rate: float, format: torch.memory_format) -> torch.Tensor:
    torch.manual_seed(2)
    x, target = images(8, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.contiguous(memory_format=format)), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("block", "rate"), [(rf.BasicBlock, 2e-3), (rf.Bottleneck, 2e-3)], ids=["resnet18", "resnet50"])
def test_fifty_steps_have_stock_s_loss_curve(block: type, rate: float):
    """The yardstick of float noise is stock against itself, with the same numbers in another memory format.

    Learning rates are small, so that a difference in the last place isn't blown up to the size of the loss.
    """
    ours, theirs = pair(block, LAYERS[block])
    other = copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)
    curve, stock = loss_curve(ours, rate, CL), loss_curve(theirs, rate, CL)
    noise = (loss_curve(other, rate, torch.contiguous_format) - stock).abs().max()
    assert stock[-1] < stock[0] / 2, "the network doesn't learn"
    assert noise < 0.05 * stock[0], "the test is no test"
    assert (curve - stock).abs().max() <= 4 * noise + 1e-4
    # On a GPU stock's batch norms do.
    assert not torch.equal(curve, stock) or curve.is_cuda or "cpu" not in rf.available_backends(), "our ops didn't run"


def gradients(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


BLOCKS = {
    "basic": (rf.BasicBlock, (16, 16), {}),
    "basic-projection": (rf.BasicBlock, (16, 24, 2), {}),
    "bottleneck": (rf.Bottleneck, (32, 8), {}),
    "bottleneck-projection": (rf.Bottleneck, (16, 8, 2), {}),
    "bottleneck-grouped": (rf.Bottleneck, (32, 8), {"groups": 4, "base_width": 32}),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_blocks_are_as_good_as_stock_s(name: str, memory_efficient: bool, frozen: bool):
    """In training, and in eval mode with a derivative (fine-tuning with frozen statistics)."""
    block, args, kwargs = BLOCKS[name]
    ours = block(*args, **kwargs, memory_efficient=memory_efficient).to(memory_format=CL).train(not frozen)
    theirs = THEIRS[block](*args, downsample=copy.deepcopy(ours.downsample), **kwargs).to(memory_format=CL).train(not frozen)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, args[0], 10, 10).contiguous(memory_format=CL)
    dy = torch.randn_like(ours(x))
    truth = gradients(copy.deepcopy(theirs).double(), x.double(), dy)
    want, got = gradients(theirs, x, dy), gradients(ours, x, dy)
    assert got.keys() == want.keys()
    for key in want:
        assert_as_good_as_stock(got[key], want[key], truth[key])
    for key, value in theirs.state_dict().items():
        if frozen or "running" not in key:
            assert torch.equal(ours.state_dict()[key], value) or "num_batches" in key


def test_gradients_under_autocast():
    """bfloat16 activations, float32 parameters; the blocks' own error against float64 is no larger than twice stock's."""
    block, args, _ = BLOCKS["bottleneck"]
    for memory_efficient in (False, True):
        ours = block(*args, memory_efficient=memory_efficient).to(memory_format=CL)
        theirs = THEIRS[block](*args).to(memory_format=CL)
        theirs.load_state_dict(ours.state_dict())
        x, dy = (torch.randn(8, 32, 8, 8).contiguous(memory_format=CL) for _ in range(2))
        truth = gradients(copy.deepcopy(theirs).double(), x.double(), dy)
        want, got = gradients(theirs, x, dy, True), gradients(ours, x, dy, True)
        for key in want:
            assert_as_good_as_stock(got[key], want[key], truth[key])
    with torch.autocast("cpu", torch.float16):
        assert ours(x).dtype == theirs(x).dtype


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
def test_compiled_training_step(memory_efficient: bool):
    """fullgraph, through Inductor: loss, gradients and running statistics of the eager step."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), rf.BasicBlock(16, 16), rf.BasicBlock(16, 24, 2), nn.Flatten(), nn.Linear(24 * 16, 10)
    )
    for block in model[1:3]:
        block.memory_efficient = memory_efficient
    model = model.to(memory_format=CL).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x, target = images(4, 16)
    for step in (eager, compiled):
        F.cross_entropy(step(x), target).backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing():
    block = rf.Bottleneck(16, 8, 2)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(block(x).sum(), x)
    (checkpointed,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, checkpointed)


def test_copies_and_state_dicts_in_the_middle_of_training():
    """deepcopy, an EMA copy and a reloaded checkpoint go on exactly as the original does."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        torch.manual_seed(5)
        x, target = images(4, 32)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model = network(rf.BasicBlock, [1, 1, 1, 1])
    optimizer = new_optimizer(model)
    # On a GPU PyTorch itself fails to average counters ("Integer division with addcdiv is no longer supported").
    on_cpu = torch.get_default_device().type == "cpu"
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=on_cpu)
    for _ in range(2):
        step(model, optimizer)
        average.update_parameters(model)
    with torch.no_grad():
        model.eval()(images(2, 32)[0])  # the folded path is built, and must not travel with copies
        model.train()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    reloaded = network(rf.BasicBlock, [1, 1, 1, 1])
    reloaded.load_state_dict(saved["model"])
    optimizers = [optimizer, new_optimizer(twin), new_optimizer(reloaded)]
    for other in optimizers[1:]:
        other.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for _ in range(2):
        losses = [step(each, its) for each, its in zip((model, twin, reloaded), optimizers, strict=True)]
        assert losses[0] == losses[1] == losses[2]
    torchvisions = network(resnet.BasicBlock, [1, 1, 1, 1])
    torchvisions.load_state_dict(average.module.state_dict())
    x = images(2, 32)[0]
    torch.testing.assert_close(average.module.eval()(x), torchvisions.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_activations_kept_for_backward():
    """Not more bytes than stock's, and memory_efficient saves a Bottleneck's two inner results."""

    def kept(model: nn.Module, x: torch.Tensor) -> int:
        storages: dict[int, int] = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in parameters:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        del y
        return sum(storages.values())

    x = torch.randn(8, 64, 16, 16).contiguous(memory_format=CL)
    ours, theirs = rf.Bottleneck(64, 16).to(memory_format=CL), resnet.Bottleneck(64, 16).to(memory_format=CL)
    assert kept(ours, x) <= kept(theirs, x) + 4096  # statistics by channel
    before = kept(ours, x)
    ours.memory_efficient = True
    inner = 8 * 16 * 16 * 16 * 4
    assert before - kept(ours, x) == 2 * inner


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiling_runs_nothing(dynamic: bool):
    """What torch.compile asks of an op isn't answered by computing its input, which would move running statistics twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(64), rf.BasicBlock(64, 64))
    other, x = copy.deepcopy(model), torch.randn(8, 64, 12, 12)
    torch.compile(other, fullgraph=True, backend="eager", dynamic=dynamic)(x)
    model(x)
    for (name, got), want in zip(other.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
