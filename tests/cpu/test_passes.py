"""Passes over activations (gate, batch norm, concatenation, sum, function) and the mean over pixels: the compiled kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.cpu_layers import run
from support.tolerances import assert_as_good_as_stock

from resnet_fused.backends import Activation, ConvParameters, Epilogue, Problem, Step, get
from resnet_fused.backends.accuracy import ProblemCheck, inputs_of, more_inputs_of, parameters_of
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.problem import MORE, NO_EPILOGUE, RESIDUAL, Affine, Pointwise, Types, X

CL = torch.channels_last
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_RELU, _SILU = Activation.RELU, Activation.SILU


def gate_problem(shape, dtype=torch.float32, residual=True, activation=_RELU) -> Problem:
    epilogue = Epilogue(residual, activation, gate=True)
    reads = (X, RESIDUAL, MORE) if residual else (X, MORE)
    return Problem((Step(Pointwise.IDENTITY, epilogue, reads),), shape, Types.of(dtype), CPU)


def norm_problem(shape, dtype=torch.float32, channels=None, residual=False, activation=_RELU) -> Problem:
    channels = channels or (shape[1],)
    more = range(MORE, MORE + len(channels) - 1)
    reads = (X, RESIDUAL, *more) if residual else (X, *more)
    return Problem((Step(Affine(channels), Epilogue(residual, activation), reads),), shape, Types.of(dtype), CPU)


PROBLEMS = {
    "gate": gate_problem((2, 64, 9, 7), residual=False, activation=Activation.NONE),
    "gate, sum, ReLU": gate_problem((3, 128, 14, 14)),
    "gate, sum, SiLU": gate_problem((2, 24, 5, 5), activation=_SILU),
    "gate, hardswish, no sum": gate_problem((1, 40, 28, 28), residual=False, activation=Activation.HARDSWISH),
    "channels below a vector": gate_problem((2, 3, 8, 8)),
    "a tail of one channel": gate_problem((2, 65, 7, 5)),
    "batch 8": gate_problem((8, 48, 7, 7)),
    "more units than threads": gate_problem((1, 512, 30, 30)),
    "norm": norm_problem((2, 64, 9, 7), activation=Activation.NONE),
    "norm, ReLU": norm_problem((1, 256, 56, 56)),
    "norm, sum, leaky ReLU": norm_problem((2, 33, 6, 6), residual=True, activation=Activation.LEAKY_RELU),
    "norm of a concatenation": norm_problem((2, 64, 7, 7), channels=(64, 32, 32, 5, 1)),
    "norm of a concatenation, sum": norm_problem((1, 16, 14, 14), channels=(16, 48), residual=True),
    "norm of 25 tensors": norm_problem((1, 64, 7, 7), channels=(64, *(32,) * 24)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_values_are_as_good_as_stocks(isa: str, problem: Problem, dtype: torch.dtype):
    problem = replace(problem, types=Types.of(dtype))
    parameters = parameters_of(problem)
    inputs = (*inputs_of(problem), *more_inputs_of(problem))
    before = [None if t is None else t.clone() for t in inputs]
    kernel = get("cpu").prepare(problem, parameters)
    y = kernel(*inputs)
    assert y.is_contiguous(memory_format=CL)
    reference = get("reference")
    wide = reference.prepare(problem.with_dtype(torch.float64), parameters.to(torch.float64))
    truth = wide(*(None if t is None else t.double() for t in inputs))
    assert_as_good_as_stock(y, reference.prepare(problem, parameters)(*inputs), truth)
    assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert ProblemCheck(problem, parameters).fault(kernel) is None


def test_gelu_is_a_pass_after():
    problem = gate_problem((2, 24, 5, 5), activation=Activation.GELU)
    inputs = (*inputs_of(problem), *more_inputs_of(problem))
    x, residual, gate = inputs
    y = get("cpu").prepare(problem, parameters_of(problem))(*inputs)
    torch.testing.assert_close(y, F.gelu(x * gate + residual))


def test_other_memory_formats_are_taken_and_given():
    problem = replace(gate_problem((2, 24, 5, 6)), memory_format=torch.contiguous_format)
    x, residual, gate = (*inputs_of(problem), *more_inputs_of(problem))
    y = get("cpu").prepare(problem, parameters_of(problem))(x, residual, gate)
    assert y.is_contiguous()
    torch.testing.assert_close(y, (x * gate + residual).relu())


def test_float16_overflows_where_stock_does(isa: str):
    """Where stock stores x · gate, and not only at the end: the residual would bring the sum back."""
    x = torch.tensor([300.0, -300.0, 1.0]).half().view(1, 3, 1, 1).expand(1, 3, 4, 5).contiguous(memory_format=CL)
    gate, residual = x[:, :, :1, :1].abs().contiguous(memory_format=CL), -150 * x
    problem = gate_problem(tuple(x.shape), torch.float16, activation=Activation.NONE)
    got = get("cpu").prepare(problem, parameters_of(problem))(x, residual, gate)
    want = x * gate + residual
    assert want[0, :2, 0, 0].isinf().all(), "stock rounds before it adds"
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_where_stock_has_them(isa: str, dtype: torch.dtype):
    x = torch.randn(2, 20, 4, 5, dtype=dtype).contiguous(memory_format=CL)
    residual = torch.randn_like(x)
    gate = torch.rand(2, 20, 1, 1, dtype=dtype)
    scale, shift = torch.randn(20), torch.randn(20)
    x[0, 3, 1, 1], x[0, 4, 0, 0], x[1, 19, 3, 4] = math.nan, math.inf, -math.inf
    gate[0, 4], gate[1, 0], gate[1, 1] = 0.0, math.nan, math.inf
    residual[1, 5, 2, 2], residual[1, 19, 3, 4] = math.nan, math.inf
    scale[7], shift[8] = math.inf, math.nan
    problem = gate_problem(tuple(x.shape), dtype)
    got = get("cpu").prepare(problem, parameters_of(problem))(x, residual, gate)
    want = (x * gate + residual).relu()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    problem = norm_problem(tuple(x.shape), dtype, residual=True)
    got = get("cpu").prepare(problem, ConvParameters((scale,), (shift,)))(x, residual)
    want = ((x * scale[:, None, None] + shift[:, None, None]) + residual).relu().to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 2048, 7, 7), (1, 16, 112, 112), (1, 100, 5, 9), (1, 129, 1, 2), (3, 17, 40, 33), (8, 64, 14, 14), (2, 40, 300, 1)],
    ids=str,
)
def test_the_mean_over_pixels(isa: str, shape: tuple[int, ...], dtype: torch.dtype):
    x = (torch.randn(shape) + 3).to(dtype).contiguous(memory_format=CL)
    chain = Chain([shape], dtype)
    y = run(chain, chain.average_pool(0), x)
    assert_as_good_as_stock(y, F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x.double(), 1))


def test_nan_and_infinity_stay_in_their_channel(isa: str):
    x = torch.randn(2, 40, 30, 30).contiguous(memory_format=CL)
    x[0, 3, 29, 1], x[1, 39, 2, 2] = math.nan, math.inf
    chain = Chain([tuple(x.shape)], torch.float32)
    y = run(chain, chain.average_pool(0), x)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, 1), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = gate_problem((1, 64, 40, 40))
        parameters = parameters_of(problem)
        assert ProblemCheck(problem, parameters).fault(get("cpu").prepare(problem, parameters)) is None
        x = torch.randn(1, 24, 50, 50).contiguous(memory_format=CL)
        chain = Chain([tuple(x.shape)], torch.float32)
        torch.testing.assert_close(run(chain, chain.average_pool(0), x), F.adaptive_avg_pool2d(x, 1))
    finally:
        torch.set_num_threads(before)


# ---- in a chain ------------------------------------------------------------------------------------------------------


def _passed(chain: Chain, sources, gate=None, residual=None, epilogue=NO_EPILOGUE) -> int:
    return chain.one_pass(sources, gate, residual, None, None, epilogue)


def test_several_results_and_results_written_over_others():
    """A pass may be written over its input or its residual, but not where that is a result, an input, or read once more."""
    a, b = (torch.randn(2, 12, 6, 6).contiguous(memory_format=CL) for _ in range(2))
    chain = Chain([(2, 12, 6, 6)] * 2, torch.float32)
    added = _passed(chain, [0], residual=1)  # over neither: both are inputs
    clipped = _passed(chain, [added], epilogue=Epilogue(activation=_RELU))  # not over `added`, which is read again
    both = _passed(chain, [added], residual=clipped)  # over `clipped`
    mean = chain.average_pool(both)
    gated = _passed(chain, [both], gate=mean, residual=added)  # over neither: both are results
    last = _passed(chain, [gated])  # over `gated`
    chain.end([last, both, added])
    before = a.clone(), b.clone()
    for _ in range(2):
        got = torch.ops.resnet_fused_cpu.run_chain(chain.id, [a, b])
        total = a + b
        doubled = total + total.relu()
        for y, want in zip(got, (doubled * doubled.mean((2, 3), keepdim=True) + total, doubled, total), strict=True):
            torch.testing.assert_close(y, want)
        assert len({y.data_ptr() for y in got}) == 3
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


def test_a_value_that_is_its_own_residual():
    x = torch.randn(1, 12, 6, 6).contiguous(memory_format=CL)
    chain = Chain([(1, 12, 6, 6)], torch.float32)
    first = _passed(chain, [0])
    y = run(chain, _passed(chain, [first], residual=first), x)
    torch.testing.assert_close(y, 2 * x)


def test_kernels_of_another_dtype_are_not_joined():
    kernels = [
        get("cpu").prepare(p, parameters_of(p)) for p in (gate_problem((1, 8, 4, 4)), gate_problem((1, 8, 4, 4), DTYPES[1]))
    ]
    assert all(isinstance(kernel, ChainKernel) for kernel in kernels)
    assert kernels[0].joins(kernels[0])
    assert not kernels[0].joins(kernels[1])


REFUSED = {
    "sources is empty": lambda chain: _passed(chain, []),
    "sources differ in batch, height or width": lambda chain: _passed(chain, [0, 1]),
    "a source is 7": lambda chain: _passed(chain, [7]),
    "gate must have one pixel": lambda chain: _passed(chain, [0], gate=1),
    "residual differs from the result in shape": lambda chain: _passed(chain, [0], residual=1),
    "scale and shift go together": lambda chain: chain.one_pass([0], None, None, torch.ones(8), None, Epilogue()),
    "must be contiguous float32 with 8": lambda chain: chain.one_pass(
        [0], None, None, torch.ones(7), torch.ones(7), Epilogue()
    ),
    "x is -1": lambda chain: chain.average_pool(-1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_named(message: str):
    chain = Chain([(1, 8, 4, 4), (1, 8, 4, 5)], torch.float32)
    with pytest.raises(ValueError, match=message):
        REFUSED[message](chain)


def test_what_is_refused_says_why():
    plain = Problem.of(Pointwise.IDENTITY, (1, 8, 4, 4), torch.float32, CPU, Epilogue(activation=_RELU))
    assert "no kernel for relu" in get("cpu").why_not(plain)
    assert "not torch.float64" in get("cpu").why_not(gate_problem((1, 8, 4, 4), torch.float64))
    for name in ("onednn", "triton", "cuda", "cudnn"):
        assert get(name).why_not(gate_problem((1, 8, 4, 4))) is not None
        assert get(name).why_not(norm_problem((1, 8, 4, 4))) is not None
