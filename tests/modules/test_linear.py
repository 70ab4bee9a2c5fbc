"""The classifier of a fused model: as good as nn.Linear, and nn.Linear wherever it can't be more."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tolerances import assert_as_good_as_stock
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models import resnet18

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.modules.linear import FusedLinear

needs_kernels = pytest.mark.skipif(
    backends.get("cpu").unavailable() is not None, reason=f"cpu backend: {backends.get('cpu').unavailable()}"
)


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), head

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def fused(head: nn.Module) -> FusedLinear:
    return rf.fuse(Net(head).eval()).fc


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "features", "classes"), [(1, 24, 10), (3, 24, 1000), (128, 24, 33)])
def test_rows_are_multiplied_by_our_kernel(dtype, rows, features, classes):
    stock = nn.Linear(features, classes).to(dtype)
    ours, x = fused(copy.deepcopy(stock)), torch.randn(rows, features).to(dtype)
    with torch.no_grad():
        wide = copy.deepcopy(stock).double()
        assert_as_good_as_stock(ours(x), stock(x), wide(x.double()))
    assert "cpu" in ours._runner.backends_used


@needs_kernels
def test_strided_rows_and_nan_are_as_in_stock():
    stock = nn.Linear(24, 10)
    ours, x = fused(copy.deepcopy(stock)), torch.randn(24, 5).t()
    x[2, 3] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), equal_nan=True)
    assert ours._runner is not None


@needs_kernels
def test_changes_of_the_weight_are_noticed():
    ours, x = fused(nn.Linear(24, 10)), torch.randn(2, 24)
    with torch.no_grad():
        before = ours(x)
        ours.weight.mul_(2)
        ours.bias.mul_(2)
        torch.testing.assert_close(ours(x), 2 * before)


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


@pytest.mark.parametrize("change", [_other_head, _no_bias, _parametrized, _pruned])
@torch.no_grad()
def test_other_parameters_than_it_was_fused_with(change):
    stock, x = nn.Linear(24, 10), torch.randn(2, 24)
    ours = fused(copy.deepcopy(stock))
    ours(x)
    change(stock), change(ours)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(24), id="one row"),
        pytest.param(torch.randn(2, 3, 24), id="3-d"),
        pytest.param(torch.randn(0, 24), id="no rows"),
        pytest.param(torch.randn(129, 24), id="many rows"),
    ],
)
def test_other_inputs_go_to_stock(x):
    stock = nn.Linear(24, 10)
    ours = fused(copy.deepcopy(stock))
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
    assert ours._runner is None


def test_a_derivative_and_autocast_go_to_stock():
    ours, x = fused(nn.Linear(24, 10)), torch.randn(2, 24, requires_grad=True)
    ours(x).sum().backward()
    torch.testing.assert_close(x.grad, ours.weight.detach().sum(0).expand(2, 24))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert ours._runner is None


@pytest.mark.parametrize("chosen", ["reference", "onednn"])
def test_another_backend_leaves_it_to_stock(chosen):
    ours, x = fused(nn.Linear(24, 10)), torch.randn(2, 24)
    with torch.no_grad(), rf.use_backend(chosen):
        ours(x)
    assert ours._runner is None


def test_wrong_width_raises_stocks_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(nn.Linear(24, 10))(torch.randn(2, 25))


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(nn.Linear(24, 10, bias=False), id="no bias"),
        pytest.param(parametrizations.weight_norm(nn.Linear(24, 10)), id="parametrized"),
        pytest.param(nn.Linear(24, 1 << 18), id="large"),
    ],
)
def test_other_layers_are_left_alone(head):
    kind = type(fused(head))
    assert not issubclass(kind, FusedLinear)


def test_exact_precision_leaves_it_alone():
    assert type(rf.fuse(Net(nn.Linear(24, 10)).eval(), precision="exact").fc) is nn.Linear


@torch.no_grad()
def test_the_argument_has_stocks_name():
    ours, x = fused(nn.Linear(24, 10)), torch.randn(2, 24)
    assert torch.equal(ours(input=x), ours(x))


def test_it_is_an_nn_linear_with_its_parameters_and_hooks():
    net = Net(nn.Linear(24, 10)).eval()
    seen = []
    net.fc.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ours = rf.fuse(net)
    assert isinstance(ours.fc, nn.Linear)
    assert {*ours.fc.state_dict()} == {"weight", "bias"}
    assert type(net.fc) is nn.Linear
    with torch.no_grad():
        ours(torch.randn(1, 3, 8, 8))
    assert seen == [(1, 10)]
    again = pickle.loads(pickle.dumps(fused(nn.Linear(24, 10))))
    assert type(again) is FusedLinear


@needs_kernels
@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copied", "loaded"])
def test_made_again_under_inference_mode_it_gives_the_same(again):
    net, x = fused(nn.Linear(24, 10)), torch.randn(2, 24)
    with torch.inference_mode():
        other = again(net)
        assert torch.equal(other(x), net(x))
        assert "cpu" in other._runner.backends_used


@pytest.mark.parametrize("how", ["fx", "compile", "export", "jit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_stocks_linear(how):
    model, x = rf.fuse(resnet18().eval()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        if how == "fx":
            got = torch.fx.symbolic_trace(model)(x)
        elif how == "compile":
            got = torch.compile(model, fullgraph=True, backend="eager")(x)
        elif how == "export":
            got = torch.export.export(model, (x,)).module()(x)
        else:
            got = torch.jit.trace(model, x)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
