"""The end of a fused model: its average pool and classifier by kernels, as good as stock's, or by stock."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.fast_paths import assert_same_model, needs_kernels, runs
from support.tolerances import assert_as_good_as_stock
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models import resnet18

import resnet_fused as rf
from resnet_fused.backends.processor import processor

pytestmark = pytest.mark.cpu

channels_last = torch.channels_last


class Net(nn.Module):
    """A convolution with its batch norm, and a classifier of 24 features."""

    def __init__(self, head: nn.Module, shape: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.shape, self.fc = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), shape or nn.Identity(), head

    def forward(self, x):
        return self.fc(self.shape(self.bn(self.conv(x)).mean((2, 3))))


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6)


def classifiers(fused: nn.Module) -> list[str]:
    """Backends that served the classifier, by kinds of input; none where stock did."""
    every = [problem for run in runs(fused) for problem in run.problems.values()]
    return [backend for problem, backend in every if problem.shape[1:] == (24, 1, 1)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 10), (3, 1000), (128, 33)])
@torch.no_grad()
def test_rows_are_multiplied_by_our_kernel(dtype, rows, classes):
    net = Net(nn.Linear(24, classes)).eval().to(dtype)
    fused, x = rf.fuse(net), images(rows).to(dtype)
    got, want = fused(x), net(x)
    assert_as_good_as_stock(got, want, copy.deepcopy(net).double()(x.double()))
    assert got.stride() == want.stride()
    # With AMX oneDNN is faster, and may be with instructions for float16; the layer is stock's.
    amx = dtype == torch.bfloat16 and torch.ops.resnet_fused_cpu.amx_bf16()
    native = dtype == torch.float16 and processor().multiplies("float16")
    assert classifiers(fused) == ([] if amx or native else ["cpu"])


@needs_kernels
@torch.no_grad()
def test_nan_stays_in_its_row():
    net = Net(nn.Linear(24, 10)).eval()
    fused, x = rf.fuse(net), images(5)
    x[2, 1, 3, 3], x[4, 0, 0, 0] = float("nan"), float("inf")
    got, want = fused(x), net(x)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)
    assert classifiers(fused) == ["cpu"]


def _other_head(fc: nn.Linear) -> None:
    fc.weight, fc.bias = nn.Parameter(torch.ones(5, 24)), nn.Parameter(torch.ones(5))


def _no_bias(fc: nn.Linear) -> None:
    fc.bias = None


def _parametrized(fc: nn.Linear) -> None:
    parametrize.register_parametrization(fc, "weight", nn.Tanh())
    fc(torch.zeros(2, 24))
    fc.parametrizations.weight.original.mul_(2)


def _pruned(fc: nn.Linear) -> None:
    prune.identity(fc, "weight")
    fc(torch.zeros(2, 24))
    fc.weight_mask.zero_()


def _in_place(fc: nn.Linear) -> None:
    fc.weight.mul_(2), fc.bias.mul_(2)


@pytest.mark.parametrize("change", [_in_place, _other_head, _no_bias, _parametrized, _pruned])
@torch.no_grad()
def test_other_parameters_than_it_was_fused_with(change):
    net, x = Net(nn.Linear(24, 10)).eval(), images()
    fused = rf.fuse(net)
    before = fused(x)
    change(net.fc), change(fused.fc)
    for _ in range(2):
        torch.testing.assert_close(fused(x), net(x))
    assert fused(x).shape != before.shape or not torch.allclose(fused(x), before)


STOCK = {
    "one row": (lambda: Net(nn.Linear(24, 10), nn.Flatten(0)), images(1)),
    "3-d": (lambda: Net(nn.Linear(24, 10), nn.Unflatten(0, (1, 2))), images(2)),
    "no rows": (lambda: Net(nn.Linear(24, 10)), images(0)),
    "many rows": (lambda: Net(nn.Linear(24, 10)), images(129)),
    "no bias": (lambda: Net(nn.Linear(24, 10, bias=False)), images()),
    "parametrized": (lambda: Net(parametrizations.weight_norm(nn.Linear(24, 10))), images()),
    "large": (lambda: Net(nn.Linear(24, 1 << 18)), images()),
    "float64": (lambda: Net(nn.Linear(24, 10)).double(), images().double()),
}


@pytest.mark.parametrize("make, x", STOCK.values(), ids=STOCK)
@torch.no_grad()
def test_other_inputs_and_layers_go_to_stock(make, x):
    net = make().eval()
    fused = rf.fuse(net)
    got, want = fused(x), net(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got.stride() == want.stride()
    assert classifiers(fused) == []
    assert_same_model(fused, net)


def test_a_derivative_and_autocast_go_to_stock():
    net, x = Net(nn.Linear(24, 10)).eval(), images()
    fused, grads = rf.fuse(net), []
    for m in (fused, net):
        given = x.clone().requires_grad_()
        m(given).sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == net(x).dtype == torch.bfloat16
    assert classifiers(fused) == []


@pytest.mark.parametrize("chosen", ["reference", "onednn"])
@torch.no_grad()
def test_another_backend_leaves_it_to_stock(chosen):
    fused = rf.fuse(Net(nn.Linear(24, 10)).eval())
    with rf.use_backend(chosen):
        fused(images())
    assert runs(fused)
    assert classifiers(fused) == []


@torch.no_grad()
def test_exact_precision_leaves_it_to_stock():
    fused = rf.fuse(Net(nn.Linear(24, 10)).eval(), precision="direct")
    fused(images())
    assert runs(fused)
    assert classifiers(fused) == []


@torch.no_grad()
def test_wrong_width_raises_stocks_error():
    fused = rf.fuse(Net(nn.Linear(25, 10)).eval())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fused(images())


@torch.no_grad()
def test_the_layer_itself_is_stocks_with_its_hooks():
    net, x = Net(nn.Linear(24, 10)).eval(), torch.randn(2, 24)
    seen = []
    net.fc.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fused = rf.fuse(net)
    assert_same_model(fused, net)
    fused(images(1))
    assert seen == [(1, 10)]
    assert torch.equal(fused.fc(input=x), net.fc(x))


AGAIN = {"copied": copy.deepcopy, "loaded": lambda net: pickle.loads(pickle.dumps(net))}


@needs_kernels
@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
@torch.no_grad()
def test_made_again_it_gives_the_same(again):
    fused, x = rf.fuse(Net(nn.Linear(24, 10)).eval()), images()
    want = fused(x)
    other = again(fused)
    with torch.inference_mode():
        assert torch.equal(other(x), want)
    assert classifiers(other) == ["cpu"]


@pytest.mark.parametrize("how", ["fx", "compile", "export", "jit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_tracers_see_stocks_linear(how):
    model, x = rf.fuse(resnet18().eval()), torch.randn(2, 3, 64, 64)
    want = model(x)
    if how == "fx":
        got = torch.fx.symbolic_trace(model)(x)
    elif how == "compile":
        got = torch.compile(model, fullgraph=True, backend="eager")(x)
    elif how == "export":
        program = torch.export.export(model, (x,))
        assert "aten.linear.default" in {str(node.target) for node in program.graph.nodes}
        got = program.module()(x)
    else:
        got = torch.jit.trace(model, x)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- the average pool ------------------------------------------------------------------------------------------------


def pooled(channels: int, size: object = 1) -> nn.Module:
    """A convolution for each channel by itself, and a pool."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(size)).eval()


@pytest.fixture
def stock_calls(monkeypatch) -> list[torch.Tensor]:
    """The inputs that stock's pool was called with."""
    called = []
    forward = nn.AdaptiveAvgPool2d.forward
    monkeypatch.setattr(nn.AdaptiveAvgPool2d, "forward", lambda self, x: called.append(x) or forward(self, x))
    return called


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 7, 7), (3, 100, 5, 9), (2, 129, 1, 2), (1, 17, 40, 33)])
@torch.no_grad()
def test_the_mean_is_as_good_as_stocks(dtype, shape, stock_calls):
    net = pooled(shape[1]).to(dtype)
    x = (torch.randn(shape) + 3).to(dtype)
    fused = rf.fuse(net)
    for format in (torch.contiguous_format, channels_last):
        given = x.contiguous(memory_format=format)
        got = fused(given)
        assert not stock_calls
        want = net(given)
        stock_calls.clear()
        assert_as_good_as_stock(got, want, copy.deepcopy(net).double()(x.double()))
        stock_calls.clear()
        assert got.stride() == want.stride()


@needs_kernels
@torch.no_grad()
def test_nan_and_infinity_stay_in_their_channel(stock_calls):
    net, x = pooled(40), torch.randn(2, 40, 3, 3)
    x[0, 3, 1, 1], x[1, 39, 2, 2] = float("nan"), float("inf")
    with torch.no_grad():
        net[0].weight.abs_()
    got = rf.fuse(net)(x)
    assert not stock_calls
    want = net(x)
    assert (want.isnan().sum(), want.isinf().sum()) == (1, 1)
    torch.testing.assert_close(got, want, equal_nan=True)


POOLED_BY_STOCK = {
    "float64": torch.randn(2, 8, 4, 4).double(),
    "one pixel": torch.randn(2, 8, 1, 1),
    "empty": torch.randn(0, 8, 4, 4),
}


@pytest.mark.parametrize("x", POOLED_BY_STOCK.values(), ids=POOLED_BY_STOCK)
@torch.no_grad()
def test_other_inputs_go_to_stocks_pool(x, stock_calls):
    net = pooled(8).to(x.dtype)
    got = rf.fuse(net)(x)
    assert len(stock_calls) == 1
    want = net(x)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()


class PoolOfInput(nn.Module):
    """A pool of what the caller gives, in whichever format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.bn(self.conv(x)), self.pool(x)


GIVEN = {
    "channels_last": (torch.randn(2, 8, 4, 4).contiguous(memory_format=channels_last), 0),
    "contiguous": (torch.randn(2, 8, 4, 4), 1),
    "strided": (torch.randn(2, 8, 8, 4).contiguous(memory_format=channels_last)[:, :, ::2], 1),
}


@needs_kernels
@pytest.mark.parametrize("x, calls", GIVEN.values(), ids=GIVEN)
@torch.no_grad()
def test_a_pool_of_the_input_takes_it_as_it_comes(x, calls, stock_calls):
    net = PoolOfInput().eval()
    _, got = rf.fuse(net)(x)
    assert len(stock_calls) == calls
    want = nn.functional.adaptive_avg_pool2d(x, 1)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()


def test_derivatives_autocast_and_other_backends_go_to_stocks_pool(stock_calls):
    net, x = pooled(8), torch.randn(2, 8, 4, 4)
    fused = rf.fuse(net)
    fused(x.requires_grad_()).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused(x)
    with torch.no_grad(), rf.use_backend("reference"):
        fused(x)
    assert len(stock_calls) == 3


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), [1, 1], 1], ids=str)
@torch.no_grad()
def test_each_spelling_of_one_pixel(size, stock_calls):
    rf.fuse(pooled(8, size))(torch.randn(1, 8, 6, 6))
    assert not stock_calls


@pytest.mark.parametrize("size", [2, (1, None), (1, 2)], ids=str)
@torch.no_grad()
def test_other_pools_are_stocks(size, stock_calls):
    net, x = pooled(8, size), torch.randn(1, 8, 6, 6)
    got = rf.fuse(net)(x)
    assert len(stock_calls) == 1
    torch.testing.assert_close(got, net(x))


@torch.no_grad()
def test_a_hook_of_the_pool_is_called(stock_calls):
    net, seen = pooled(8), []
    net[3].register_forward_hook(lambda module, args, y: seen.append((args[0].stride(), y.shape)))
    fused, x = rf.fuse(net), torch.randn(1, 8, 6, 6)
    fused(x), net(x)
    assert seen == 2 * [((288, 36, 6, 1), (1, 8, 1, 1))]
    assert len(stock_calls) == 2


@torch.no_grad()
def test_a_size_that_was_changed_since_is_stocks():
    net, x = pooled(8), torch.randn(2, 8, 4, 4)
    fused = rf.fuse(net)
    fused(x)
    fused[3].output_size = net[3].output_size = 2
    assert fused(x).shape == (2, 8, 2, 2)
    torch.testing.assert_close(fused(x), net(x))


class Tokens(nn.Module):
    """Linear layers on images with channels last, as ConvNeXt has them, or on rows of tokens."""

    def __init__(self, tokens: bool = False, contiguous: bool = True) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 24, 3), nn.Linear(24, 40), nn.Linear(40, 24)
        self.tokens, self.contiguous = tokens, contiguous

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2) if self.tokens else self.conv(x).permute(0, 2, 3, 1)
        y = self.down(torch.relu(self.up(y.contiguous() if self.contiguous else y)))
        return y if self.tokens else y.permute(0, 3, 1, 2)


def linears(fused: nn.Module) -> list[tuple[int, str]]:
    """Output channels and backends of linear layers on pixels."""
    every = [problem for run in runs(fused) for problem in run.problems.values()]
    return [
        (problem.conv.out_channels, backend) for problem, backend in every if problem.shape[:1] + problem.shape[2:3] == (1, 1)
    ]


@needs_kernels
@pytest.mark.parametrize("tokens", [False, True], ids=["pixels", "tokens"])
@torch.no_grad()
def test_linear_layers_on_pixels_are_1x1_convolutions(tokens):
    net = Tokens(tokens).eval()
    fused, x = rf.fuse(net), images(3)
    for _ in range(2):
        got, want = fused(x), net(x)
        assert_as_good_as_stock(got, want, copy.deepcopy(net).double()(x.double()))
        assert got.stride() == want.stride()
        for each in (net, fused):
            each.up.weight.mul_(1.5)
    assert linears(fused)[-2:] == [(40, "cpu"), (24, "cpu")]
    x[0, 0, 0, 0] = torch.nan
    assert torch.equal(fused(x).isnan(), net(x).isnan())


@torch.no_grad()
def test_linear_layers_on_other_pixels_are_stocks():
    for net, x in ((Tokens(contiguous=False), images()), (Tokens(), images(0)), (Tokens().double(), images().double())):
        fused = rf.fuse(net.eval())
        got, want = fused(x), net(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert got.stride() == want.stride()
        # What stock's makes of pixels that aren't contiguous is contiguous.
        assert {channels for channels, _ in linears(fused)} <= ({24} if not net.contiguous else set())
