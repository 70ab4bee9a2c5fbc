"""What rf.fuse can't prove safe: run exactly as it was, with the reason in the report, and the same results."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.fast_paths import assert_same_model, ops, report, rows
from support.tolerances import assert_as_good_as_stock
from torch import nn
from torch.nn.utils import parametrizations, prune

import resnet_fused as rf
from resnet_fused.runtime import parameters


class ConvBN(nn.Module):
    """conv, batch norm, activation; the activation is a module or a function."""

    def __init__(self, act=None, conv=None, bn=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(8, 8, 3, padding=1)
        self.bn = bn or nn.BatchNorm2d(8)
        self.act = act or nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class SecondReader(ConvBN):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y.mean()


class Branches(ConvBN):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) if x.sum() > 0 else x


class Counts(ConvBN):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return self.act(self.bn(self.conv(x)))


class MakesATensor(ConvBN):
    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + torch.rand(1) * 0


class OddFrozenBatchNorm2d(nn.Module):
    """Has the name and the buffers of a frozen batch norm, and computes something else."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)
        self.eps = 1e-5

    def forward(self, x):
        shape = (1, -1, 1, 1)
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean).view(shape)


OddFrozenBatchNorm2d.__name__ = "FrozenBatchNorm2d"


def _in_training_mode():
    model = ConvBN()
    model.eval().bn.train()
    return model


def _with_hook(where: str):
    model = ConvBN().eval()
    model.get_submodule(where).register_forward_hook(lambda m, args, y: y * 2)
    return model


def _pruned():
    model = ConvBN().eval()
    prune.random_unstructured(model.conv, "weight", 0.5)
    return model


def _quantized():
    model = ConvBN().eval()
    model.conv = torch.ao.nn.qat.Conv2d(8, 8, 3, padding=1, qconfig=torch.ao.quantization.default_qat_qconfig)
    return model.eval()


def _overflowing():
    model = ConvBN().eval().half()
    with torch.no_grad():
        model.bn.running_var.fill_(0)
        model.bn.weight.fill_(60000)
    return model


LEFT = {
    "hook-on-conv": (lambda: _with_hook("conv"), "convolution has forward hooks"),
    "weight-norm": (lambda: ConvBN(conv=parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))).eval(), "parametrized"),
    "old-weight-norm": (lambda: ConvBN(conv=nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))).eval(), "weight_norm"),
    "pruning-mask": (_pruned, "pruning"),
    "quantization-aware": (_quantized, "computes something else than nn.Conv2d"),
    "data-dependent-branch": (lambda: Branches().eval(), "forward of Branches branches on a tensor's values or size"),
    "forward-changes-the-module": (lambda: Counts().eval(), "forward of Counts changes its attribute 'calls'"),
    "forward-makes-a-tensor": (lambda: MakesATensor().eval(), "makes a tensor or asks PyTorch by itself (rand)"),
    "folding-overflows": (_overflowing, "overflow torch.float16"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
@torch.no_grad()
def test_left_exactly_as_it_was_with_the_reason(make, reason):
    model = make()
    x = torch.randn(2, 8, 6, 6).to(next(model.parameters()).dtype)
    fused = rf.fuse(model)
    assert_same_model(fused, model)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), want)
    for (name, a), b in zip(fused.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} was left otherwise than by stock"
    said = report(fused)
    assert (said.calls_fused, said.calls_stock) == (0, 1)
    assert said.reason
    assert said.rows
    assert "The model is no faster than stock: nothing was fused. Most frequent reason: " in str(said)
    for row in said.rows:
        assert not row.op
        assert reason in row.note, row.note


class FunctionalNorm(ConvBN):
    def forward(self, x):
        mean, var = self.bn.running_mean, self.bn.running_var
        return self.act(F.batch_norm(self.conv(x), mean, var, self.bn.weight, self.bn.bias, False, 0.1, self.bn.eps))


@pytest.mark.parametrize("make", [ConvBN, FunctionalNorm])
@pytest.mark.parametrize("eps", [0.0, -1.0])
@torch.no_grad()
def test_whether_a_batch_norm_takes_its_eps_is_asked_of_stock(make, eps, trained):
    """No release of PyTorch takes one below 0, and those before 2.12 don't take 0."""
    model = trained(make(bn=nn.BatchNorm2d(8, eps=eps)))
    x = torch.randn(2, 8, 6, 6)
    fused = rf.fuse(model)
    assert f"the batch norm's eps is {eps}, not above 0" in str(report(fused))
    if eps < 0 or torch.__version__ < (2, 12):
        for m in (model, fused):
            with pytest.raises(ValueError, match="batch_norm eps must be"):
                m(x)
    else:
        assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_each_convolution_has_a_reason_of_its_own():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.utils.weight_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)).eval()
    first, second = rows(rf.fuse(model))
    assert (first.op, first.note) == ("conv2d_relu", "")
    assert "weight is computed by weight_norm" in second.note


class OptionalArgument(ConvBN):
    def forward(self, x, mask=None):
        y = self.act(self.bn(self.conv(x)))
        return y if mask is None else y * mask


class CalledTwice(ConvBN):
    def forward(self, x):
        return self.act(self.bn(self.conv(self.conv(x))))


class CallsParts(nn.Module):
    """Calls a child as a whole and one of its parts by itself: swapping the part would change one of both."""

    def __init__(self):
        super().__init__()
        self.inner = ConvBN()

    def forward(self, x):
        return self.inner(x) + self.inner.bn(x)


class SharedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = ConvBN()
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ConvBN(), ConvBN()
        self.b.conv.weight = self.a.conv.weight

    def forward(self, x):
        return self.b(self.a(x))


ALLOWED = {
    "optional-argument": (OptionalArgument, 1),
    "conv-called-twice": (CalledTwice, 1),
    "parts-called-alone": (CallsParts, 1),
    "module-in-two-places": (SharedModule, 2),
    "tied-weights": (TiedWeights, 2),
}


@pytest.mark.parametrize("make, steps", ALLOWED.values(), ids=ALLOWED)
@torch.no_grad()
def test_what_is_called_twice_shared_or_optional_is_fused_and_right(make, steps, trained):
    """And stays right when the one tensor that several layers have changes."""
    model = trained(make())
    x = torch.randn(2, 8, 6, 6)
    fused = rf.fuse(model)
    for change in (1.0, -0.5):
        for m in (model, fused):
            (m.conv if hasattr(m, "conv") else next(m.children()).conv).weight.mul_(change)
        assert_as_good_as_stock(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert_same_model(fused, model)
    assert ops(fused)["conv2d_bn_relu"] == steps
    assert all(row.op == "conv2d_bn_relu" for row in rows(fused))
    parameters = [*fused.parameters()]
    assert len(parameters) == len([*model.parameters()]), "a tie was lost"


@torch.no_grad()
def test_an_optional_argument_that_is_given_is_stocks(trained):
    model = trained(OptionalArgument())
    fused, x, mask = rf.fuse(model), torch.randn(2, 8, 6, 6), torch.rand(2, 8, 6, 6)
    for call in (lambda m: m(x, mask), lambda m: m(x, mask=mask), lambda m: m(mask=mask, x=x), lambda m: m(x, None)):
        assert torch.equal(call(fused), call(model))
    assert report(fused).calls_fused == 0
    torch.testing.assert_close(fused(x=x), model(x), rtol=1e-5, atol=1e-5)
    assert report(fused).calls_fused == 1
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fused(mask=mask)


PARTLY = {
    "elu": (lambda: ConvBN(act=nn.ELU()), "conv2d_bn", "ELU follows, which isn't fused"),
    "hook-on-relu": (lambda: _with_hook("act"), "conv2d_bn", "ReLU follows"),
}


@pytest.mark.parametrize("make, op, note", PARTLY.values(), ids=PARTLY)
def test_what_follows_stays_and_the_report_says_why(make, op, note):
    model = make().eval()
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    (row,) = rows(fused)
    assert row.op == op
    assert note in row.note


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 4, padding="same"),
        nn.Conv2d(8, 8, 3, padding="valid"),
        nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(8, 8, (3, 5), padding=(1, 2), padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate", stride=2),
    ],
    ids=["same", "same-even-kernel", "valid", "reflect", "circular", "replicate"],
)
def test_padding_strings_and_modes(conv, trained):
    model = trained(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert rows(fused)[0].op == "conv2d_bn_relu"


class Views(nn.Module):
    """Flattens with view, which fails on channels_last results: people write this after pools of any size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x):
        y = F.avg_pool2d(self.body(x), 2)
        return self.fc(y.view(y.size(0), -1))


def test_view_behind_a_fused_module_works_as_in_stock(trained):
    model = trained(Views())
    fused = rf.fuse(model)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_example_inputs_are_compared(trained, monkeypatch, caplog):
    model = trained(ConvBN())
    x = torch.randn(1, 8, 6, 6)
    assert rf.fuse(model, example_inputs=x) is not model

    fold = parameters.fold_weights
    monkeypatch.setattr(parameters, "fold_weights", lambda *args: tuple(t * 1.5 for t in fold(*args)))
    state = copy.deepcopy(model.state_dict())
    for inplace in (False, True):
        caplog.clear()
        assert rf.fuse(model, example_inputs=x, inplace=inplace) is model
        assert "the fused model is wrong on example_inputs, so the original is returned" in caplog.text
        assert "fused by resnet_fused" not in repr(model)
        with pytest.raises(ValueError, match="that rf.fuse didn't make"):
            rf.report(model)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": torch.ones(1)}, TypeError, "model is Tensor"),
        ({"backend": "cudnnn"}, ValueError, "backend is 'cudnnn'; it must be 'auto' or one of"),
        ({"precision": "double"}, ValueError, "precision is 'double'; it must be 'fast' or 'direct'"),
        ({"tune": True}, ValueError, "tune=True needs example_inputs"),
    ],
    ids=["no-module", "backend", "precision", "tune"],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        rf.fuse(**{"model": ConvBN().eval(), **arguments})


def test_training_mode_is_asked_of_the_batch_norms(caplog):
    model = nn.Sequential(ConvBN(), ConvBN())
    model.eval()[1].bn.train()
    rf.fuse(model)
    assert "1 of the model's 2 batch norms are in training mode" in caplog.text
    with pytest.raises(ValueError, match="stock is in training mode"):
        rf.verify(model, rf.fuse(model), torch.randn(1, 8, 6, 6))
    caplog.clear()
    wrapped = nn.DataParallel(model.eval())
    assert wrapped.training
    fused = rf.fuse(wrapped)
    assert not caplog.text
    assert rf.verify(wrapped, fused, torch.randn(1, 8, 6, 6)).passed


def test_report_of_something_else():
    with pytest.raises(ValueError, match="that rf.fuse didn't make"):
        rf.report(nn.Linear(1, 1))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_image_without_its_batch_is_taken_where_stock_takes_it(grad: bool):
    """nn.BatchNorm2d refuses it, and FrozenBatchNorm2d doesn't."""
    resnet, frozen = torchvision.models.resnet, torchvision.ops.FrozenBatchNorm2d
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=frozen).eval()
    trunk = nn.Sequential(*[*model.children()][:-1])
    fused, x = rf.fuse(trunk), torch.randn(3, 64, 64)
    assert all(row.op for row in rows(fused))
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(fused(x), trunk(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(fused(x[None]), fused(x))
    plain = rf.fuse(nn.Sequential(ConvBN()).eval())
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="expected 4D input"):
        plain(torch.randn(8, 6, 6))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_convolution_without_filters_does_not_keep_the_others_from_being_fused():
    """Stock makes it, and refuses it only where it is called."""
    model = nn.Sequential(ConvBN(), nn.Sequential(nn.Conv2d(8, 0, 1), nn.BatchNorm2d(0))).eval()
    fused, x = rf.fuse(model), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused[0](x), model[0](x), rtol=1e-4, atol=1e-5)
        assert ops(fused)["conv2d_bn_relu"] == 1
        for net in (model, fused):
            with pytest.raises(RuntimeError, match="at least 1"):
                net(x)


class Looped(nn.Module):
    """Calls what is in a container one by one, not the container."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ConvBN(), nn.MaxPool2d(2), ConvBN())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _no_statistics(m):
    m.layers[0].bn.running_mean = m.layers[0].bn.running_var = None


def _another_convolution(m):
    torch.manual_seed(5)
    m.layers[2].conv = nn.Conv2d(8, 8, 3, padding=1)


def _another_layer(m):
    m.layers[1] = nn.AvgPool2d(2)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("change", [_no_statistics, _another_convolution, _another_layer], ids=lambda f: f.__name__)
def test_changes_inside_of_a_container_with_hooks_are_seen(change, hooked, trained):
    model = trained(Looped())
    if hooked:
        model.layers.register_forward_hook(lambda *args: None)
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        change(model), change(fused)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_pad_by_what_was_noted_when_the_layer_was_made(mode, trained):
    """Stock reads the attribute `padding` only where it pads with zeros."""
    model = trained(ConvBN(conv=nn.Conv2d(8, 8, 5, padding="same", padding_mode=mode)))
    model.conv.padding = (1, 1)
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        want = model(x)
        assert want.shape == x.shape
        torch.testing.assert_close(rf.fuse(model)(x), want, rtol=1e-5, atol=1e-5)


class Warns(ConvBN):
    """A branch that warns, as torchvision's GoogLeNet has one for scripting."""

    loud = False

    def forward(self, x):
        if torch.jit.is_scripting() or self.loud:
            warnings.warn("loud", stacklevel=1)
        return super().forward(x)


class PassesWarnOn(ConvBN):
    def forward(self, x):
        list(map(warnings.warn, ()))
        return super().forward(x)


@torch.no_grad()
def test_a_warning_that_is_not_given_is_no_obstacle_and_one_that_is_given_is_given_at_every_call(trained):
    model = trained(Warns())
    fused, x = rf.fuse(model), torch.randn(2, 8, 6, 6)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fused(x)
        assert (report(fused).calls_fused, len(given)) == (1, 0)
        fused.loud = True
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(given) == 2
        assert report(fused).calls_fused == 1


def test_a_forward_that_passes_the_function_that_warns_on_is_stocks(trained):
    fused = rf.fuse(trained(PassesWarnOn()))
    assert "calls warnings.warn" in rows(fused)[0].note
