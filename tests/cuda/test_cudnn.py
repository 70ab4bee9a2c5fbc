"""The cudnn backend: its limits, and what it passes to PyTorch's operators (which need a GPU to run)."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.problems import problem_of

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.backends import BackendError, ConvParameters, get
from resnet_fused.backends.cudnn import convolution as cudnn
from resnet_fused.backends.cudnn.backend import CuDNN
from resnet_fused.backends.problem import Conv
from resnet_fused.backends.reference.batch_norm import StockPasses

CUDA = torch.device("cuda", 0)
CONV = Conv(8, 16, (3, 3), (2, 1), (1, 0), (1, 2), 2)


def problem(op="conv2d_bn_add_relu", shape=(2, 8, 9, 9), dtype=torch.float16, device=CUDA, precision="fast"):
    return problem_of(op, shape, dtype, device, (CONV,), precision=precision)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return CuDNN()


def test_is_unavailable_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no GPU" in backends.get("cudnn").unavailable()
    with (
        pytest.raises(BackendError, match="name is 'cudnn', which is not available here: there is no GPU"),
        rf.use_backend("cudnn"),
    ):
        pass
    with pytest.raises(BackendError, match="backend is 'cudnn'.*Choose one of rf.available_backends"):
        rf.fuse(torch.nn.Identity(), backend="cudnn")


LIMITS = {
    "no-relu": (problem("conv2d_bn"), "no fused operation for conv2d_bn"),
    "cpu-tensors": (problem(device=torch.device("cpu")), "not cpu"),
    "float64": (problem(dtype=torch.float64), "float64"),
    "empty": (problem(shape=(0, 8, 9, 9)), "empty"),
    "32-bit-indices": (problem(shape=(2**14, 8, 129, 129)), "32 bits"),
    "exact-with-tf32-allowed": (problem(dtype=torch.float32, precision="direct"), "fp32_precision"),
}


@pytest.mark.parametrize(("unserved", "reason"), [pytest.param(*limit, id=name) for name, limit in LIMITS.items()])
def test_says_what_it_can_not_serve(unserved, reason, backend):
    assert reason in backend.why_not(unserved)


def test_serves_what_is_within_its_limits(backend):
    assert backend.why_not(problem()) is None
    assert backend.why_not(problem("conv2d")) is None


@pytest.mark.parametrize(
    ("dtype", "groups", "measured", "wins"),
    [
        (torch.float16, 1, True, True),
        (torch.bfloat16, 1, True, True),
        (torch.float32, 1, True, False),
        (torch.float16, 2, True, False),
        (torch.float16, 1, False, False),
    ],
)
def test_is_the_rules_choice_only_where_it_was_measured(dtype, groups, measured, wins, backend, monkeypatch):
    monkeypatch.setattr(cudnn, "was_measured", lambda device: measured)
    posed = problem_of("conv2d_bn_relu", (2, 8, 9, 9), dtype, CUDA, (Conv(8, 16, (3, 3), groups=groups),))
    assert backend.preferred(posed) == wins


@pytest.fixture
def operators(monkeypatch):
    """Stands in for PyTorch's CUDA operators, on CPU tensors."""

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    def apply(x, residual, mean, var, weight, bias, eps, function, slope):
        assert function in ("none", "relu")
        return StockPasses().apply(x, residual, mean, var, weight, bias, eps, function == "relu")

    aten = SimpleNamespace(cudnn_convolution_relu=relu, cudnn_convolution_add_relu=add_relu)
    passes = SimpleNamespace(bn_apply_fwd=SimpleNamespace(default=apply))
    monkeypatch.setattr(cudnn.torch, "ops", SimpleNamespace(aten=aten, resnet_fused_cuda=passes))
    return aten


@pytest.mark.parametrize("op", ["conv2d_bn_relu", "conv2d_bn_add_relu"])
def test_passes_the_geometry_on(op, backend, operators):
    posed = problem(op, dtype=torch.float32, device=torch.device("cpu"))
    folded = ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),))
    x = torch.randn(posed.shape)
    residual = torch.randn(posed.output_shape()) if op == "conv2d_bn_add_relu" else None
    y = backend.prepare(posed, folded)(x, residual)
    expected = F.conv2d(x, folded.weights[0], folded.biases[0], CONV.stride, CONV.padding, CONV.dilation, CONV.groups)
    torch.testing.assert_close(y, F.relu(expected if residual is None else expected + residual))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_problem_without_an_engine_is_an_error_when_it_is_prepared(backend, operators):
    def no_engine(*args):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    operators.cudnn_convolution_add_relu = no_engine
    with pytest.raises(BackendError, match="unable to find an engine"):
        backend.prepare(
            problem(device=torch.device("cpu"), dtype=torch.float32),
            ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),)),
        )


def numbers_for_nan(y):
    return y.nan_to_num(0.0)


def garbage_of_z(y):
    y[-1, -1, -1, -1] = torch.nan
    return y


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(numbers_for_nan, "turns NaN into a number"), (garbage_of_z, "makes a NaN where stock has none"), (lambda y: y, None)],
)
@pytest.mark.parametrize("op", ["conv2d_bn_relu", "conv2d_bn_add_relu"])
def test_an_engine_that_is_wrong_about_nan_is_not_taken(op, fault, reason, backend, operators):
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        right = getattr(operators, name)
        setattr(operators, name, lambda *args, right=right: fault(right(*args)))
    posed = problem(op, dtype=torch.float32, device=torch.device("cpu"))
    folded = ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),))
    if reason is None:
        backend.prepare(posed, folded)
        return
    with pytest.raises(BackendError, match=reason):
        backend.prepare(posed, folded)


def test_a_nan_that_stock_spreads_as_well_is_no_fault(backend, operators, monkeypatch):
    def spread(y):
        """To the whole image."""
        return y.masked_fill(y.isnan().flatten(1).any(1)[:, None, None, None], torch.nan)

    right, stock = operators.cudnn_convolution_relu, backends.get("reference").prepare
    operators.cudnn_convolution_relu = lambda *args: spread(right(*args))
    folded = ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),))
    posed = problem("conv2d_bn_relu", dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(BackendError, match="makes a NaN"):
        backend.prepare(posed, folded)
    spreading = SimpleNamespace(prepare=lambda *args: lambda x, residual: spread(stock(*args)(x, residual)))
    monkeypatch.setattr(cudnn, "stock", lambda: spreading)
    monkeypatch.setattr(cudnn, "why_no_pass", lambda problem: "there is none here")
    backend.prepare(posed, folded)


@pytest.mark.parametrize(("trial", "during"), [("1", True), ("0", False)])
def test_engines_are_timed_when_a_problem_is_prepared(trial, during, backend, operators, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_TRIAL", trial)
    seen = []
    relu = operators.cudnn_convolution_relu

    def spy(*args):
        seen.append(torch.backends.cudnn.benchmark)
        return relu(*args)

    operators.cudnn_convolution_relu = spy
    posed = problem("conv2d_bn_relu", dtype=torch.float32, device=torch.device("cpu"))
    kernel = backend.prepare(posed, ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),)))
    kernel(torch.randn(posed.shape), None)
    assert seen[0] == during
    assert not seen[-1]


def test_each_thread_lets_cudnn_time_its_engines(backend, operators, monkeypatch):
    """PyTorch keeps an engine for the thread alone, and a heuristic one serves another."""
    seen = []
    relu = operators.cudnn_convolution_relu

    def spy(*args):
        seen.append((threading.current_thread().name, torch.backends.cudnn.benchmark))
        return relu(*args)

    operators.cudnn_convolution_relu = spy
    monkeypatch.setenv("RESNET_FUSED_TRIAL", "1")
    posed = problem("conv2d_bn_relu", dtype=torch.float32, device=torch.device("cpu"))
    kernel = backend.prepare(posed, ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),)))
    x, results = torch.randn(posed.shape), []
    main = threading.current_thread().name
    assert seen[0] == (main, True)
    seen.clear()
    kernel(x, None)
    assert seen == [(main, False)]
    seen.clear()
    thread = threading.Thread(target=lambda: results.extend(kernel(x, None) for _ in range(2)), name="other")
    thread.start()
    thread.join()
    assert seen[0] == ("other", True)
    assert seen[-2:] == [("other", False)] * 2
    torch.testing.assert_close(results, [kernel(x, None)] * 2)


def test_stock_serves_a_thread_whose_engine_is_wrong(backend, operators, caplog):
    relu = operators.cudnn_convolution_relu
    main = threading.current_thread()
    operators.cudnn_convolution_relu = lambda *a: relu(*a) if threading.current_thread() is main else relu(*a).nan_to_num(0)
    posed = problem("conv2d_bn_relu", dtype=torch.float32, device=torch.device("cpu"))
    kernel = backend.prepare(posed, ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),)))
    x, results = torch.full(posed.shape, torch.nan), []
    thread = threading.Thread(target=lambda: results.append(kernel(x, None)))
    thread.start()
    thread.join()
    assert results[0].isnan().any()
    assert "turns NaN into a number" in caplog.text


@pytest.fixture
def passes(monkeypatch):
    """The compiled pass is there."""
    monkeypatch.setattr(cudnn, "why_no_pass", lambda problem: None)


@pytest.mark.parametrize(
    ("op", "measured", "names"),
    [
        ("conv2d_bn_relu", True, ["fused", "pass"]),
        ("conv2d_bn_relu", False, ["pass", "fused"]),
        ("conv2d_bn", True, []),
        ("conv2d", True, []),
    ],
)
def test_the_most_promising_way_comes_first(op, measured, names, backend, passes, monkeypatch):
    monkeypatch.setattr(cudnn, "was_measured", lambda device: measured)
    posed = problem_of(op, (2, 8, 9, 9), torch.float16, CUDA, (CONV._replace(groups=1),))
    assert backend.why_not(posed) is None
    assert backend.plans(posed) == names
    assert backend.preferred(posed) == (op != "conv2d_bn")


@pytest.mark.parametrize("op", ["conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu"])
def test_a_pass_over_stocks_convolution(op, backend, operators, passes):
    operators.cudnn_convolution_relu = operators.cudnn_convolution_add_relu = None
    posed = problem(op, dtype=torch.float32, device=torch.device("cpu"))
    folded = ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),))
    x = torch.randn(posed.shape)
    residual = torch.randn(posed.output_shape()) if op == "conv2d_bn_add_relu" else None
    x[0, 1, 4, 4] = torch.nan
    y = backend.prepare(posed, folded, "pass")(x, residual)
    expected = get("reference").prepare(posed, folded)(x, residual)
    assert expected.isnan().any()
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_pass_serves_where_the_fused_engine_is_wrong(backend, operators, passes, monkeypatch):
    monkeypatch.setattr(cudnn, "was_measured", lambda device: True)
    relu = operators.cudnn_convolution_relu
    operators.cudnn_convolution_relu = lambda *args: relu(*args).nan_to_num(0.0)
    posed = problem("conv2d_bn_relu", dtype=torch.float32, device=torch.device("cpu"))
    folded = ConvParameters((torch.randn(16, 4, 3, 3),), (torch.randn(16),))
    x = torch.full(posed.shape, torch.nan)
    assert backend.prepare(posed, folded)(x, None).isnan().any()
    with pytest.raises(BackendError, match="turns NaN into a number"):
        backend.prepare(posed, folded, "fused")


def test_there_is_no_pass_over_other_formats_or_without_the_library(backend, monkeypatch):
    contiguous = problem_of("conv2d_bn", (2, 8, 9, 9), torch.float16, CUDA, (CONV,), memory_format=torch.contiguous_format)
    assert "it goes over channels_last tensors" in backend.why_not(contiguous)
    monkeypatch.setattr(type(get("cuda")), "unavailable", lambda self: "it isn't built")
    assert "there is no pass for it: it isn't built" in backend.why_not(problem("conv2d_bn"))
