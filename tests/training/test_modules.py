"""What nn.BatchNorm2d does, the fused functions do: statistics, modes, errors, and falling back where they don't serve."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion import batch_norm as fused

CL = torch.channels_last


def stock(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return F.relu(norm(x) + residual)


def without_bias() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(16)
    norm.bias = None  # as BatchNorm2d(16, bias=False), which older releases of PyTorch don't know
    return norm


NORMS = {
    "default": lambda: nn.BatchNorm2d(16),
    "momentum-none": lambda: nn.BatchNorm2d(16, momentum=None),
    "momentum-0.5-eps-0.1": lambda: nn.BatchNorm2d(16, momentum=0.5, eps=0.1),
    "no-running-stats": lambda: nn.BatchNorm2d(16, track_running_stats=False),
    "not-affine": lambda: nn.BatchNorm2d(16, affine=False),
    "weight-without-bias": without_bias,
    "sync-without-processes": lambda: nn.SyncBatchNorm(16),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_three_steps_leave_the_module_as_stock_leaves_it(name: str, format: torch.memory_format):
    """Values, running statistics and their count over three training steps, then in eval mode."""
    ours = NORMS[name]()
    theirs = nn.BatchNorm2d(16) if name.startswith("sync") else copy.deepcopy(ours)
    for step in range(4):
        if step == 3:
            ours.eval(), theirs.eval()
        x = (torch.randn(3, 16, 5, 6) * 2 + 1).contiguous(memory_format=format)
        residual = torch.randn_like(x)
        y = fused.bn_add_relu(ours, x, residual)
        torch.testing.assert_close(y, stock(theirs, x, residual), rtol=1e-5, atol=1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.cpu
@pytest.mark.skipif("cpu" not in rf.available_backends(), reason="the compiled CPU kernels aren't built; pip install -e .")
def test_the_fused_op_is_what_runs():
    """Guards all other tests here: without it they would pass by falling back to stock."""
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    for call in (fused.bn, fused.bn_relu):
        assert call.__name__ in call(nn.BatchNorm2d(16), x).grad_fn.name()
    assert "bn_add_relu" in fused.bn_add_relu(nn.BatchNorm2d(16), x, x).grad_fn.name()


def test_one_value_per_channel_raises_as_stock():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.bn_relu(nn.BatchNorm2d(4), torch.randn(1, 4, 1, 1))
    assert fused.bn_relu(nn.BatchNorm2d(4).eval(), torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_that_stock_refuses_raises_as_stock(eps: float):
    for call in (nn.Module.__call__, fused.bn):
        with pytest.raises(ValueError, match="eps must be positive"):
            call(nn.BatchNorm2d(4, eps=eps), torch.randn(2, 4, 3, 3))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_hook(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, output: output * 3)
    return norm


FALLBACKS = {
    "another-norm": (lambda: nn.GroupNorm(4, 16), torch.float32),
    "a-subclass": (lambda: Doubled(16), torch.float32),
    "with-a-hook": (lambda: with_hook(nn.BatchNorm2d(16)), torch.float32),
    "parametrized": (
        lambda: nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(16), "weight", nn.Softplus()),
        torch.float32,
    ),
    "float64": (lambda: nn.BatchNorm2d(16).double(), torch.float64),
    "residual-that-broadcasts": (lambda: nn.BatchNorm2d(16), torch.float32),
    "residual-of-another-dtype": (lambda: nn.BatchNorm2d(16), torch.float32),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_ops_do_not_serve_runs_as_stock(name: str):
    make, dtype = FALLBACKS[name]
    ours = make()
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 16, 5, 6, dtype=dtype)
    residual = (
        torch.randn(16, 1, 1)
        if "broadcasts" in name
        else torch.randn(x.shape).to(torch.float16 if "another-d" in name else dtype)
    )
    torch.testing.assert_close(fused.bn_add_relu(ours, x, residual), stock(theirs, x, residual), rtol=0, atol=0)
    if not name.startswith("residual"):
        torch.testing.assert_close(fused.bn_relu(ours, x), theirs(x).relu(), rtol=0, atol=0)


def test_empty_batches_and_wrong_channels_are_as_stock():
    norm = nn.BatchNorm2d(16).eval()
    assert fused.bn_relu(norm, torch.randn(0, 16, 3, 3)).shape == (0, 16, 3, 3)
    with pytest.raises(RuntimeError, match="running_mean should contain 8 elements"):
        fused.bn_relu(norm, torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        fused.bn_relu(norm, torch.randn(2, 16, 3))


def test_functional_transforms_and_forward_mode_run_as_stock():
    norm = nn.BatchNorm2d(16).eval()
    x = torch.randn(4, 2, 16, 3, 3)
    torch.testing.assert_close(torch.vmap(lambda x: fused.bn_relu(norm, x))(x), torch.stack([norm(each).relu() for each in x]))
    grad = torch.func.grad(lambda x: fused.bn_relu(norm, x).square().sum())(x[0])
    torch.testing.assert_close(grad, torch.func.grad(lambda x: norm(x).relu().square().sum())(x[0]))
    _, tangent = torch.func.jvp(lambda x: fused.bn_relu(norm, x), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: norm(x).relu(), (x[0],), (x[1],))[1])


def test_a_whole_model_in_bfloat16():
    """Parameters and statistics in bfloat16 as well; stock gives the same."""
    ours = nn.BatchNorm2d(16).bfloat16()
    theirs = copy.deepcopy(ours)
    x = torch.randn(4, 16, 6, 6).bfloat16()
    torch.testing.assert_close(fused.bn_relu(ours, x), theirs(x).relu(), rtol=0.02, atol=0.02)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("autocast", "n", "pixels"), [(False, 512, 2), (True, 512, 5)])
def test_images_smaller_than_a_winograd_tile_train(autocast: bool, n: int, pixels: int):
    block = rf.BasicBlock(64, 64)
    x = torch.randn(n, 64, pixels, pixels, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
