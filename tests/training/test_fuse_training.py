"""rf.fuse_training: any model trains as stock does, in values, gradients, statistics and random numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

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
# Else stock's norms are the best there are, as on GPUs.
OURS = "cpu" in rf.available_backends() and torch.get_default_device().type == "cpu"
needs_kernels = pytest.mark.skipif(not OURS, reason="it needs CPU tensors and the compiled CPU kernels; pip install -e .")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks here are small: on a busy machine threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timm_model(name: str, **arguments: object) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=10, **arguments)


def timm_resnet50(**arguments: object) -> nn.Module:
    """Of a quarter of its width, with all of its depth."""
    pytest.importorskip("timm")
    from timm.models import resnet as timm_resnet

    return timm_resnet.ResNet(timm_resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, base_width=16, **arguments)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), {"bn_relu": 9, "bn_add_relu": 8, "bn": 3}),
    "resnet50": (
        lambda: torchvision.models.ResNet(resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=16),
        {"bn_relu": 33, "bn_add_relu": 16, "bn": 4},
    ),
    "timm-resnet50": (timm_resnet50, {"bn_relu": 33, "bn_add_relu": 16, "bn": 4}),
    "timm-resnet50-dropping": (
        lambda: timm_resnet50(drop_rate=0.2, drop_path_rate=0.3),
        {"bn_relu": 33, "bn_add_relu": 1, "bn": 19},
    ),
    "regnety": (lambda: timm_model("regnety_002"), {"bn_relu": 27, "bn_add_relu": 13, "bn": 4}),
    "regnety-dropping": (
        lambda: timm_model("regnety_002", drop_path_rate=0.3),
        {"bn_relu": 27, "bn_add_relu": 4, "bn": 13},
    ),
}


def prepared(model: nn.Module) -> nn.Module:
    """In training mode, channels_last, with weak residual branches: rounding errors would grow from block to block."""
    for module in model.modules():
        last = [getattr(module, name, None) for name in ("bn3", "bn2")]
        if hasattr(module, "downsample") and any(isinstance(norm, nn.BatchNorm2d) for norm in last):
            nn.init.constant_(next(norm for norm in last if norm is not None).weight, 0.2)
    return model.to(memory_format=CL).train()


def step(model: nn.Module, x: torch.Tensor, seed: int = 7, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Results, all gradients as one vector, and buffers after a step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    loss = F.cross_entropy(y.to(x.dtype), torch.arange(len(x)) % y.shape[1])
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = {"y": y.detach(), "gradients": torch.cat(gradients), **buffers}
    return found if x.grad is None else {**found, "x": x.grad}


def assert_step_as_stock(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, autocast: bool = False) -> None:
    double = copy.deepcopy(theirs).double()
    truth = step(double, x.double())
    want, got = step(theirs, x, autocast=autocast), step(ours, x, autocast=autocast)
    assert got.keys() == want.keys()
    for key, value in want.items():
        if value.is_floating_point():
            assert_as_good_as_stock(got[key], value, truth[key])
        else:
            assert torch.equal(got[key], value), key
    assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in theirs.parameters()]


def ops_of(model: nn.Module) -> dict[str, int]:
    """How many batch norms each op computes, by the report."""
    rows = rf.report(model).norms
    return {op: sum(row.op == op for row in rows) for op in {row.op for row in rows}}


def names_of_history(y: torch.Tensor) -> list[str]:
    """Names of all functions that backward will call."""
    found, seen = [y.grad_fn], set()
    names = []
    while found:
        function = found.pop()
        if function is not None and function not in seen:
            seen.add(function)
            names.append(function.name())
            found += [following for following, _ in function.next_functions]
    return names


def fused_calls(y: torch.Tensor) -> dict[str, int]:
    """How many ops of ours for batch norms computed y, by what backward will call."""
    names = [name.removesuffix("_functionBackward") for name in names_of_history(y)]
    return {op: names.count(op) for op in ("bn", "bn_relu", "bn_add_relu") if op in names}


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(count, 3, size, size).contiguous(memory_format=CL)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_stock_s(name: str):
    """Logits, gradients, running statistics and their counts; dropout and drop_path draw the same numbers."""
    torch.manual_seed(1)
    make, ops = MODELS[name]
    theirs = prepared(make())
    ours = rf.fuse_training(theirs)
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = images(8, 64)
    assert_step_as_stock(ours, theirs, x)
    assert ops_of(ours) == ops
    assert fused_calls(ours(x)) == (ops if OURS else {})


class Small(nn.Module):
    """Two convolutions with norms, a residual sum, and a classifier."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def small(change: Callable[[nn.Module], object] = lambda model: None, kind: type[nn.Module] = Small) -> nn.Module:
    torch.manual_seed(1)
    model = kind().to(memory_format=CL).train()
    change(model)
    return model


class ReadTwice(Small):
    """A norm's result has two readers, and so has what a ReLU in place overwrites."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        z = y * 2
        y = self.relu(y)
        u = self.bn2(self.conv2(y + z))
        return self.relu(u) + u


class SharedNorm(Small):
    """One norm is called twice: its statistics move in the order of the calls."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.conv1(x), self.conv2(self.conv1(x).relu())
        a = self.bn1(y)
        b = self.bn1(z)
        return F.relu(a + b)


class WritesBetween(Small):
    """The input of a norm is overwritten before the sum."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        with_norm = self.bn1(y.clone())
        z = self.conv2(F.relu(with_norm.detach()))
        y.mul_(2)
        return F.relu(with_norm + y) + self.bn2(z)


class ReadsStatistics(Small):
    """The running statistics are read between a norm and the sum."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        z = self.bn1(y)
        mean = self.bn1.running_mean.clone()
        return self.bn2(F.relu(y + z)) + mean.view(-1, 1, 1)


class AsksForDtype(Small):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(y)).relu() if self.fc.weight.dtype == torch.float32 else y


class InPlaceSums(Small):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(y.relu()))
        y += z  # which the ReLU before has read, too
        return y.relu_()


class ManyForms(Small):
    """Sums and ReLUs as functions, methods and modules, seen through what does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Identity()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.nothing(self.bn1(self.conv1(x))))
        return torch.add(self.nothing(self.bn2(self.conv2(y))), y).relu()


class Dropping(Small):
    """Random numbers by a module, a function and a method; two branches by the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(0.3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.bn1(self.conv1(x)).relu())
        y = F.dropout(y, 0.2, self.training)
        y = y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.8)
        return y * 3 if self.training else super().features(x)


class Counting(Small):
    """Its forward writes to buffers, and changes a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(16, 1, 1))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = super().features(x)
        self.average.mul_(0.9).add_(y.detach().mean((0, 2, 3), keepdim=True)[0])
        return y * self.average


class ByValue(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x)
        return self.fc((y if y.sum() > 0 else -y).mean((2, 3)))


class WithoutGradient(Small):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(y)).relu()


class Doubled(torch.autograd.Function):
    """Its derivative isn't that of what forward does."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        return dy * 2


class OwnDerivative(Small):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(super().features(x))


class Checkpointed(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(checkpoint(self.features, x, use_reentrant=False).mean((2, 3)))


def scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda module, inputs, output: output * factor


CHANGES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "plain": (small, {"bn_relu": 1, "bn_add_relu": 1}),
    "hook": (lambda: small(lambda m: m.bn1.register_forward_hook(scaled(2))), {"": 1, "bn_add_relu": 1}),
    "hook-on-relu": (lambda: small(lambda m: m.relu.register_forward_hook(scaled(2))), {"bn": 1, "bn_add_relu": 1}),
    "frozen-norm": (lambda: small(lambda m: m.bn1.eval()), {"bn_relu": 1, "bn_add_relu": 1}),
    "eval-mode": (lambda: small(lambda m: m.eval()), {"bn_relu": 1, "bn_add_relu": 1}),
    "no-gradient-of-norm": (lambda: small(lambda m: m.bn1.requires_grad_(False)), {"bn_relu": 1, "bn_add_relu": 1}),
    "no-gradient-of-conv": (lambda: small(lambda m: m.conv1.requires_grad_(False)), {"bn_relu": 1, "bn_add_relu": 1}),
    "momentum-none": (lambda: small(lambda m: setattr(m.bn1, "momentum", None)), {"bn_relu": 1, "bn_add_relu": 1}),
    "contiguous": (lambda: small(lambda m: m.to(memory_format=torch.contiguous_format)), {"bn_relu": 1, "bn_add_relu": 1}),
    "read-twice": (lambda: small(kind=ReadTwice), {"bn": 2}),
    "shared-norm": (lambda: small(kind=SharedNorm), {"bn": 1, "": 1}),
    "writes-between": (lambda: small(kind=WritesBetween), {"bn": 2}),
    "reads-statistics": (lambda: small(kind=ReadsStatistics), {"bn": 2}),
    "in-place-sums": (lambda: small(kind=InPlaceSums), {"bn": 2}),
    "many-forms": (lambda: small(kind=ManyForms), {"bn_relu": 1, "bn_add_relu": 1}),
    "dropping": (lambda: small(kind=Dropping), {"bn_relu": 1, "": 1}),
    "dropping-eval": (lambda: small(lambda m: m.eval(), kind=Dropping), {"bn_relu": 1, "bn_add_relu": 1}),
    "counting": (lambda: small(kind=Counting), {"bn_relu": 1, "bn_add_relu": 1}),
    "by-value": (lambda: small(kind=ByValue), {"": 2}),
    "without-gradient": (lambda: small(kind=WithoutGradient), {"": 2}),
    "own-derivative": (lambda: small(kind=OwnDerivative), {"": 2}),
    "checkpointed": (lambda: small(kind=Checkpointed), {"": 2}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_model_may_do_is_done(name: str):
    make, ops = CHANGES[name]
    theirs = make()
    ours = rf.fuse_training(theirs)
    for _ in range(2):
        assert_step_as_stock(ours, theirs, images())
    assert ops_of(ours) == ops


def test_a_hook_on_a_norm_is_called_once():
    model, calls = small(), []
    model.bn1.register_forward_hook(lambda module, inputs, output: calls.append(module))
    ours = rf.fuse_training(model, inplace=True)
    assert ours is model
    ours(images()).sum().backward()
    assert calls == [model.bn1]


@needs_kernels
def test_changes_after_fusing_are_seen():
    ours = rf.fuse_training(small(), inplace=True)
    both = {"bn_relu": 1, "bn_add_relu": 1}
    assert fused_calls(ours(images())) == both
    changes: list[tuple[Callable[[], object], dict[str, int]]] = [
        (lambda: setattr(ours, "bn1", nn.BatchNorm2d(16, momentum=0.7)), both),
        (lambda: setattr(ours, "bn1", nn.GroupNorm(4, 16)), {"bn_add_relu": 1}),
        (lambda: setattr(ours, "relu", nn.SiLU()), {"bn_add_relu": 1}),
    ]
    for change, ops in changes:
        change()
        theirs = copy.deepcopy(rf.unfuse(copy.deepcopy(ours)))
        assert fused_calls(ours(images())) == ops
        theirs(images())
        assert_step_as_stock(ours, theirs, images())
    handle = ours.conv2.register_forward_hook(scaled(2))
    assert_step_as_stock(ours, rf.unfuse(copy.deepcopy(ours)), images())
    handle.remove()
    assert_step_as_stock(ours, rf.unfuse(copy.deepcopy(ours)), images())


def test_a_branch_by_the_parameters_dtype_is_taken_again():
    theirs = small(kind=AsksForDtype)
    ours = rf.fuse_training(theirs)
    ours(images()), theirs(images())
    ours.double(), theirs.double()
    torch.testing.assert_close(ours(images().double()), theirs(images().double()))


@pytest.mark.parametrize("name", ["resnet18", "regnety"])
def test_autocast(name: str):
    torch.manual_seed(1)
    theirs = prepared(MODELS[name][0]())
    ours = rf.fuse_training(theirs)
    assert_step_as_stock(ours, theirs, images(8, 64), autocast=True)


def test_norms_of_processes_without_a_group():
    theirs = small()
    ours = rf.fuse_training(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs)))
    assert type(ours.bn1) is nn.SyncBatchNorm
    if OURS:  # stock's takes tensors on a GPU only
        assert_step_as_stock(ours, theirs, images())


def test_inference_and_training_of_one_model():
    """rf.fuse before or after; eval mode after training steps; rf.unfuse takes out both."""
    theirs, x = small(), images()
    for fuse in (
        lambda m: rf.fuse(rf.fuse_training(m), inplace=True),
        lambda m: rf.fuse_training(rf.fuse(m), inplace=True),
    ):
        stock = copy.deepcopy(theirs)
        ours = fuse(stock)
        for _ in range(2):
            assert_step_as_stock(ours.train(), stock.train(), x)
            with torch.no_grad():
                torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)
        report = rf.report(ours)
        assert report.calls_fused == 2
        assert len(report.norms) == 2
        assert "Training: 2 of 2 batch norms fused" in str(report)
        assert "for training" in repr(ours)
        rf.unfuse(ours)
        assert all("forward" not in vars(m) for m in ours.modules())
        assert repr(ours) == repr(stock)
        assert fused_calls(ours.train()(x)) == {}


def test_only_training_is_fused():
    theirs, x = small(), images()
    ours = rf.fuse_training(theirs).eval()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval()(x))
        ours.train(), theirs.train()
        assert torch.equal(ours(x), theirs(x))
    report = rf.report(ours)
    assert report.rows == []
    assert str(report) == "Training: 2 of 2 batch norms fused (bn_relu 1, bn_add_relu 1)."


def test_copies_go_on_as_the_original():
    model = rf.fuse_training(small())
    model(images()).sum().backward()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    other = rf.fuse_training(small())
    other.load_state_dict(model.state_dict())
    want = step(model, images())
    for each in (*copies, other):
        got = step(each, images())
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert fused_calls(each(images())) == ({"bn_relu": 1, "bn_add_relu": 1} if OURS else {})


def test_gradients_accumulate_and_checkpoints_recompute():
    theirs, x = small(), images()
    ours = rf.fuse_training(theirs)
    for _ in range(2):
        ours(x).sum().backward()
    twice = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours(x).sum().backward()
    for p, both in zip(ours.parameters(), twice, strict=True):
        torch.testing.assert_close(both, 2 * p.grad, rtol=1e-4, atol=1e-4)
    for reentrant in (False, True):
        given = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(ours(given).square().sum(), given)
        checkpoint(ours, given, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(given.grad, plain, rtol=1e-4, atol=1e-5)


def test_double_backward():
    theirs = small()
    ours = rf.fuse_training(theirs)

    def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    truth = penalty(copy.deepcopy(theirs).double(), images().double())
    assert_as_good_as_stock(penalty(ours, images()), penalty(theirs, images()), truth)


def test_the_compiler_gets_the_model_s_own_forward():
    theirs, x = small(), images()
    compiled = torch.compile(rf.fuse_training(theirs), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), torch.compile(theirs, fullgraph=True, backend="eager")(x))


def test_transforms_run_as_stock():
    theirs, x = small(lambda m: m.eval()), images()
    ours = rf.fuse_training(theirs)
    for model in (ours, theirs):
        model.requires_grad_(False)
    got, want = (torch.func.grad(lambda x, m=model: m(x).square().sum())(x) for model in (ours, theirs))
    assert torch.equal(got, want)


def test_our_own_blocks_train_by_themselves():
    """Memory-efficient blocks stay so."""
    theirs = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), rf.Bottleneck(16, 4, memory_efficient=True))
    ours = rf.fuse_training(theirs)
    y = ours(images())
    assert torch.equal(y, rf.fuse_training(theirs)(images()))
    if OURS:
        assert fused_calls(y) == {"bn_relu": 1, "bn_add_relu": 1}
        assert sum("bn_relu_conv2d" in name for name in names_of_history(y)) == 2


def test_arguments_that_are_no_models_are_refused():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        rf.fuse_training("resnet50")
    with pytest.raises(ValueError, match="lazy module"):
        rf.fuse_training(nn.Sequential(nn.LazyConv2d(3, 1)))
