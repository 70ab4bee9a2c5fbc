"""bn, bn_relu and bn_add_relu on every backend of this machine: values, gradients, statistics, formats, registration."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.problems import problem_of
from support.tolerances import FLOOR, TIMES_STOCK, assert_as_good_as_stock, relative_error

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.backends import NO_PARAMETERS, BackendError, choice, get
from resnet_fused.backends.batch_norm import passes
from resnet_fused.backends.cpu.batch_norm import BatchNorm
from resnet_fused.ops import batch_norm

OPS = ["bn", "bn_relu", "bn_add_relu"]
EPS = 1e-5
CL, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Case:
    """One input and the reason for it."""

    id: str
    shape: tuple[int, int, int, int] = (3, 32, 6, 5)
    dtype: torch.dtype = torch.float32
    format: torch.memory_format = CL
    mean: float = 0.0
    affine: bool = True
    frozen: bool = False


CASES = [
    Case("whole-vectors"),
    Case("planes", format=NCHW),
    Case("channels-are-no-multiple-of-a-vector", shape=(2, 37, 5, 7)),
    Case("one-image", shape=(1, 16, 4, 4)),
    Case("three-channels-odd-planes", shape=(2, 3, 17, 19), format=NCHW),
    Case("one-channel", shape=(2, 1, 5, 5)),
    Case("one-pixel", shape=(6, 24, 1, 1)),
    Case("many-rows-in-several-blocks", shape=(5, 20, 24, 24)),
    Case("planes-longer-than-a-run", shape=(1, 2, 65, 65), format=NCHW),
    Case("mean-1000-deviations", shape=(4, 16, 8, 8), mean=1000.0),
    Case("mean-1000-deviations-planes", shape=(4, 16, 8, 8), mean=1000.0, format=NCHW),
    Case("without-parameters", affine=False),
    Case("frozen", frozen=True),
    Case("frozen-planes", frozen=True, format=NCHW, shape=(2, 5, 3, 3)),
    Case("bfloat16", dtype=torch.bfloat16, shape=(3, 40, 6, 5)),
    Case("bfloat16-planes", dtype=torch.bfloat16, format=NCHW, shape=(2, 8, 7, 7)),
    Case("bfloat16-frozen", dtype=torch.bfloat16, frozen=True),
    Case("float16-runs-as-stock", dtype=torch.float16),
]


class Inputs:
    """Activations in the case's dtype; parameters and statistics in float32, as under autocast."""

    def __init__(self, case: Case) -> None:
        self.case = case
        channels = case.shape[1]

        def activation(mean: float = 0.0) -> torch.Tensor:
            return (torch.randn(case.shape) + mean).to(case.dtype).contiguous(memory_format=case.format)

        self.x, self.residual, self.dy = activation(case.mean), activation(), activation()
        self.weight = self.bias = self.mean = self.var = None
        if case.affine:
            self.weight, self.bias = torch.randn(channels), torch.randn(channels)
            self.weight[0] = 0 if channels > 1 else -1
        if case.frozen:
            self.mean, self.var = torch.randn(channels), torch.rand(channels) + 0.5

    def tensors(self, dtype: torch.dtype | None) -> list[torch.Tensor | None]:
        """x, residual, weight, bias as leaves; in `dtype`, or as they are."""
        given = (self.x, self.residual, self.weight, self.bias)
        return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]


def stock(op: str, inputs: Inputs, dtype: torch.dtype | None = None, mask: torch.Tensor | None = None):
    """Stock PyTorch's result and gradients. `mask` takes the place of ReLU's own, so that truth and result have one mask."""
    x, residual, weight, bias = inputs.tensors(dtype)
    mean, var = (t if t is None or dtype is None else t.to(dtype) for t in (inputs.mean, inputs.var))
    y = F.batch_norm(x, mean, var, weight, bias, training=not inputs.case.frozen, eps=EPS)
    if op == "bn_add_relu":
        y = y + residual
    if op != "bn":
        y = y.relu() if mask is None else torch.where(mask, y, torch.zeros_like(y))
    wanted = [t for t in ((x, residual, weight, bias) if op == "bn_add_relu" else (x, weight, bias)) if t is not None]
    return y.detach(), torch.autograd.grad(y, wanted, inputs.dy.to(y.dtype))


def ours(op: str, inputs: Inputs):
    x, residual, weight, bias = inputs.tensors(None)
    first = (x, residual) if op == "bn_add_relu" else (x,)
    y, *statistics = getattr(ops, op)(*first, weight, bias, inputs.mean, inputs.var, EPS, "")
    wanted = [t for t in (*first, weight, bias) if t is not None]
    return y, torch.autograd.grad(y, wanted, inputs.dy), statistics


def compare(case: Case, op: str, backends: tuple[str, ...]) -> None:
    """Values, gradients and statistics by each of the backends with stock's and with the truth. "cpu" may refuse a case."""
    inputs = Inputs(case)
    want, _ = stock(op, inputs)
    truth, _ = stock(op, inputs, torch.float64)
    for backend in backends:
        try:
            with rf.use_backend(backend):
                y, grads, statistics = ours(op, inputs)
        except BackendError:
            assert backend == "cpu"
            assert case.dtype == torch.float16 or get("cpu").unavailable() is not None
            continue
        assert_as_good_as_stock(y.detach(), want, truth)
        assert y.is_contiguous(memory_format=case.format)
        # Where rounding moved a value across zero the masks differ, and so do right gradients: each is compared with the
        # truth of its own mask.
        mask = y > 0 if op != "bn" else None
        _, exact = stock(op, inputs, torch.float64, mask)
        _, stock_grads = stock(op, inputs, mask=mask)
        for grad, stock_grad, true_grad in zip(grads, stock_grads, exact, strict=True):
            assert_as_good_as_stock(grad, stock_grad, true_grad)
        if not case.frozen:
            exact_x = inputs.x.double()
            var, mean = torch.var_mean(exact_x, (0, 2, 3), correction=0)
            assert (statistics[0] - mean).norm() < FLOOR[torch.float32] * (mean.abs() + var.sqrt()).norm()
            stock_var = torch.native_batch_norm(inputs.x, None, None, None, None, True, 0.1, EPS)[2].double() ** -2 - EPS
            limit = max(FLOOR[torch.float32], TIMES_STOCK * relative_error(stock_var, var))
            assert relative_error(statistics[1], var) < limit
            assert relative_error(statistics[2], exact_x.var((0, 2, 3))) < limit


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients_on_every_backend(case: Case, op: str):
    compare(case, op, ("auto", "reference"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients_with_each_instruction_set(case: Case, op: str, isa: str):
    compare(case, op, ("cpu",))


@pytest.mark.parametrize("format", [CL, NCHW], ids=["rows", "planes"])
def test_cpu_kernels_write_all_of_their_outputs(format: torch.memory_format, isa: str, monkeypatch):
    """Every tensor that the kernels are given to write into is poisoned with NaN."""
    poisoned = lambda make: lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    kernels = BatchNorm().prepare(problem_of("bn", (2, 19, 5, 3), torch.float32, torch.device("cpu")), NO_PARAMETERS, None)
    x = torch.randn(2, 19, 5, 3).contiguous(memory_format=format)
    mean, var = kernels.statistics(x)
    y = kernels.apply(x, x, mean, var, None, None, EPS, True)
    dweight, dbias, masked = kernels.backward_reduce(x, x, y, mean, var, EPS, True)
    assert masked is not None
    dx, more = kernels.backward_apply(x, x, y, mean, var, None, (dweight, dbias, 30.0), EPS, True)
    assert more is not None
    for t in (mean, var, y, dweight, dbias, masked, dx, more):
        assert t.isfinite().all()
    assert torch.equal(masked, more)
    assert torch.equal(masked, torch.where(y > 0, x, torch.zeros_like(x)))


@pytest.mark.skipif("cpu" not in rf.available_backends(), reason="the compiled CPU kernels aren't built; pip install -e .")
def test_results_do_not_depend_on_the_number_of_threads():
    inputs = Inputs(Case("", shape=(4, 48, 20, 20)))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ours("bn_add_relu", inputs))
    finally:
        torch.set_num_threads(threads)
    (y1, grads1, statistics1), (y2, grads2, statistics2) = results
    for one, two in zip((y1, *grads1, *statistics1), (y2, *grads2, *statistics2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_stays_in_its_channel_and_never_disappears(backend: str):
    x = torch.randn(2, 20, 4, 4).contiguous(memory_format=CL)
    x[1, 3, 2, 1] = float("nan")
    x[0, 18, 0, 0] = float("inf")
    want = F.batch_norm(x, None, None, training=True).relu()
    with rf.use_backend(backend):
        y = ops.bn_relu(x, None, None, None, None, EPS, "")[0]
    assert torch.equal(y.isnan(), want.isnan())
    x.requires_grad_()
    with rf.use_backend(backend):
        ops.bn_relu(x, None, None, None, None, EPS, "")[0].sum().backward()
    assert x.grad[:, [3, 18]].isnan().all()
    assert x.grad[:, :3].isfinite().all()


def test_odd_strides_and_the_residual_that_is_the_input():
    """Slices, expanded gradients and residuals in another format give the same values; the result follows stock's format."""
    wide = torch.randn(2, 24, 6, 8).contiguous(memory_format=CL)
    for x in (wide[:, :, :, ::2], wide[:, 4:20], wide.permute(0, 1, 3, 2), wide.contiguous()[:, :, 1:4]):
        x = x.detach().requires_grad_()
        y = ops.bn_add_relu(x, x, None, None, None, None, EPS, "")[0]
        other = x.detach().clone().requires_grad_()
        want = (F.batch_norm(other, None, None, training=True, eps=EPS) + other).relu()
        torch.testing.assert_close(y, want)
        assert y.is_contiguous(memory_format=CL) == F.batch_norm(x, None, None, training=True).is_contiguous(memory_format=CL)
        y.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, other.grad, atol=2e-5, rtol=1e-4)


def test_some_inputs_need_no_gradient():
    """Whatever needs no gradient gets none, and the others are as if it did."""
    inputs = Inputs(Case(""))
    _, full, _ = ours("bn_add_relu", inputs)
    for wanted in ((0,), (1,), (2,), (0, 3), (1, 2)):
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs.tensors(None))]
        x, residual, weight, bias = tensors
        y = ops.bn_add_relu(x, residual, weight, bias, None, None, EPS, "")[0]
        y.backward(inputs.dy)
        for i, t in enumerate(tensors):
            assert (t.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(t.grad, full[i], rtol=1e-5, atol=1e-5)


def test_frozen_statistics_without_parameter_gradients_save_no_input():
    saved = []
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    weight, bias, mean, var = torch.rand(4, 16).unbind(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.bn_relu(x, weight, bias, mean, var, EPS, "")[0]
    assert sum(t.numel() == x.numel() for t in saved) == 1
    y.sum().backward()
    assert torch.equal(x.grad != 0, y > 0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("registered", [False, True], ids=["function", "operator"])
def test_gradcheck_and_second_derivative(op: str, frozen: bool, registered: bool):
    """In float64, through the autograd.Function of eager mode and through the registered operator."""
    call = getattr(torch.ops.resnet_fused if registered else ops, op)
    mean, var = (torch.randn(3).double(), torch.rand(3).double() + 0.5) if frozen else (None, None)
    first = (double(2, 3, 2, 2), double(2, 3, 2, 2)) if op == "bn_add_relu" else (double(2, 3, 2, 2),)

    def function(*args: torch.Tensor) -> torch.Tensor:
        return call(*args, mean, var, EPS, "")[0]

    inputs = (*first, double(3), double(3))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_memory_efficient_op_has_the_right_gradient_and_refuses_a_second_one():
    x, weight, bias, filter = double(2, 2, 3, 3), double(2), double(2), double(1, 2, 3, 3)

    def function(*args: torch.Tensor) -> torch.Tensor:
        x, weight, bias, filter = args
        tail = (EPS, "", [1, 1], [1, 1], [1, 1], 1)
        return ops.bn_relu_conv2d(x, weight, bias, None, None, filter, None, *tail)[0]

    assert torch.autograd.gradcheck(function, (x, weight, bias, filter))
    (dx,) = torch.autograd.grad(function(x, weight, bias, filter).sum(), x)
    assert dx.isfinite().all()
    with pytest.raises(RuntimeError, match="memory_efficient"):
        torch.autograd.grad(function(x, weight, bias, filter).sum(), x, create_graph=True)


@pytest.mark.parametrize("op", [*OPS, "bn_relu_conv2d", "bn_backward"])
def test_opcheck(op: str):
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=CL).requires_grad_()
    residual = torch.randn(2, 8, 4, 4).contiguous(memory_format=CL).requires_grad_()
    weight, bias = torch.rand(2, 8).unbind(0)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    filter = torch.randn(4, 8, 3, 3).requires_grad_()
    args = {
        "bn": [(x, weight, bias, mean, var, EPS, ""), (x, None, None, None, None, EPS, "")],
        "bn_relu": [(x, weight, bias, None, None, EPS, ""), (x.contiguous(), weight, bias, mean, var, EPS, "")],
        "bn_add_relu": [(x, residual, weight, bias, None, None, EPS, "")],
        "bn_relu_conv2d": [(x, weight, bias, None, None, filter, None, EPS, "", [2, 2], [1, 1], [1, 1], 1)],
        "bn_backward": [
            (
                "bn_relu",
                x.detach(),
                x.detach(),
                x.detach(),
                weight.detach(),
                mean,
                var,
                EPS,
                True,
                "",
                [True, True, True],
            ),
            ("bn_relu", x.detach(), None, x.detach(), None, mean, var, EPS, False, "", [True, False, False]),
        ],
    }[op]
    for each in args:
        torch.library.opcheck(getattr(torch.ops.resnet_fused, op).default, each)


def test_an_explicit_backend_that_cannot_serve_says_why():
    with rf.use_backend("onednn"), pytest.raises(BackendError, match=r"onednn.*bn_relu"):
        passes(torch.randn(1, 2, 3, 3), residual=False, relu=True)


def test_backward_on_another_thread_chooses_as_forward_did(monkeypatch):
    """On a GPU backward runs on a thread of autograd's, where no `use_backend` holds."""
    used = []
    original = batch_norm.passes

    def spy(*args):
        used.append(choice())
        return original(*args)

    monkeypatch.setattr(batch_norm, "passes", spy)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=CL).requires_grad_()
    name = rf.available_backends()[0] if x.device.type == "cpu" else "reference"
    with rf.use_backend(name) as _:
        y = ops.bn_relu(x, None, None, None, None, EPS, "")[0]
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert used == [name] * 2
    assert x.grad is not None
