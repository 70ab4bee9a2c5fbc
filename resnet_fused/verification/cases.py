"""The problems of `resnet-fused verify --device`: every kernel of a backend, with stock's result and the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.backends import NO_PARAMETERS, Activation, Backend, Conv, ConvParameters, Epilogue, Problem, Step, tf32
from resnet_fused.backends.accuracy import activations, inputs_of, parameters_of, with_nan_and_inf
from resnet_fused.backends.batch_norm import BatchNormPasses
from resnet_fused.backends.problem import RESIDUAL, Pointwise, Pool, Types, X, residual_block
from resnet_fused.backends.reference.batch_norm import StockPasses

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EPS = 1e-5


class Trial(NamedTuple):
    """One kernel on one problem.

    Attributes:
        compute: gives its result.
        stock: PyTorch's at the dtype.
        truth: PyTorch's in float64.
        rounded: where kernels compute in TF32, the same of operands rounded to it.
    """

    backend: str
    kernel: str
    op: str
    dtype: torch.dtype
    problem: str
    compute: Callable[[], Tensor]
    stock: Tensor
    truth: Tensor
    rounded: Tensor | None = None


class Entry(NamedTuple):
    """A problem of convolutions; `special` puts NaN and Inf into x, which comes in `memory_format`."""

    why: str
    shape: tuple[int, int, int, int]
    steps: tuple[Step, ...]
    special: bool = False
    memory_format: torch.memory_format = torch.channels_last

    def problem(self, dtype: torch.dtype, device: torch.device) -> Problem:
        return Problem(self.steps, self.shape, Types.of(dtype), device, self.memory_format)


def _3x3(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (3, 3), (stride, stride), (1, 1))


def _1x1(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (1, 1), (stride, stride))


_RELU, _ADD_RELU = Epilogue(activation=Activation.RELU), Epilogue(residual=True, activation=Activation.RELU)


def _one(conv: Conv, epilogue: Epilogue = _ADD_RELU) -> tuple[Step, ...]:
    return (Step(conv, epilogue, (X, RESIDUAL) if epilogue.residual else (X,)),)


_STEM = _one(Conv(3, 64, (7, 7), (2, 2), (3, 3)), _RELU._replace(pool=Pool((3, 3), (2, 2), (1, 1))))

# What a ResNet has, and what is easily wrong: partial tiles, halos, odd channels, split k, one pixel.
ENTRIES = (
    Entry("stem", (2, 3, 64, 64), _one(Conv(3, 64, (7, 7), (2, 2), (3, 3)), _RELU)),
    Entry("stem with its pool", (2, 3, 66, 72), _STEM),
    Entry("stem with its pool, contiguous", (2, 3, 61, 64), _STEM, memory_format=torch.contiguous_format),
    Entry("stem with its pool, NaN and Inf", (2, 3, 32, 40), _STEM, special=True, memory_format=torch.contiguous_format),
    Entry("3x3", (2, 64, 28, 28), _one(_3x3(64, 64))),
    Entry("3x3 strided", (2, 128, 27, 29), _one(_3x3(128, 136, 2), _RELU)),
    Entry("1x1", (4, 256, 14, 14), _one(_1x1(256, 512))),
    Entry("1x1 strided, no ReLU", (4, 64, 28, 28), _one(_1x1(64, 256, 2), Epilogue())),
    Entry("1x1, a sum without ReLU", (2, 64, 28, 28), _one(_1x1(64, 256), Epilogue(residual=True))),
    Entry("long k, few pixels", (1, 512, 7, 7), _one(_3x3(512, 512))),
    Entry("one pixel", (1, 64, 1, 1), _one(_1x1(64, 40))),
    Entry("odd channels", (2, 5, 13, 11), _one(_3x3(5, 23))),
    Entry("dilated", (1, 24, 20, 18), _one(Conv(24, 48, (3, 3), (1, 1), (2, 2), (2, 2)))),
    Entry("grouped", (2, 64, 14, 14), _one(Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 32))),
    Entry("grouped, NaN and Inf", (2, 64, 14, 14), _one(Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 8)), special=True),
    Entry("depthwise", (2, 48, 15, 14), _one(Conv(48, 48, (3, 3), (1, 1), (1, 1), (1, 1), 48))),
    Entry("depthwise, strided", (2, 40, 15, 14), _one(Conv(40, 40, (5, 5), (2, 2), (2, 2), (1, 1), 40), _RELU)),
    Entry("large image", (1, 64, 112, 112), _one(_3x3(64, 64))),
    Entry("NaN and Inf", (1, 64, 14, 14), _one(_1x1(64, 64)), special=True),
    Entry("block", (2, 64, 20, 24), residual_block([_3x3(64, 64), _3x3(64, 64)], None)),
    Entry("block, projected", (2, 64, 20, 24), residual_block([_3x3(64, 128, 2), _3x3(128, 128)], _1x1(64, 128, 2))),
    Entry("block", (2, 256, 14, 18), residual_block([_1x1(256, 64), _3x3(64, 64), _1x1(64, 256)], None)),
    Entry(
        "block, projected without stride",
        (2, 64, 19, 24),
        residual_block([_1x1(64, 64), _3x3(64, 64), _1x1(64, 256)], _1x1(64, 256)),
    ),
    Entry(
        "block, projected",
        (2, 256, 14, 18),
        residual_block([_1x1(256, 128), _3x3(128, 128, 2), _1x1(128, 512)], _1x1(256, 512, 2)),
    ),
)
ELEMENTWISE = ((2, 64, 28, 28), (2, 31, 9, 7), (4, 8, 1, 1), (1, 2048, 7, 7))


def trials(name: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, Iterator[Trial]]]:
    """All problems of a backend on a device, each with the trials of its kernels, which are none where it isn't served.

    Making a trial runs stock's ops, and may raise what they raise.
    """
    backend = backends.get(name)
    for dtype in dtypes:
        for entry in ENTRIES:
            problem = entry.problem(dtype, device)
            yield str(problem), _convs(backend, entry, problem)
        for shape in ELEMENTWISE:
            *sums, bn, bn_relu, bn_add_relu = _elementwise(shape, dtype, device)
            for problem in sums:
                yield str(problem), _add_relu(backend, problem)
            yield str(bn), _norms(backend, [bn, bn_relu, bn_add_relu])


def problems(dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    """Problems of every kind that is verified."""
    yield from (entry.problem(dtype, device) for entry in ENTRIES)
    yield from (problem for shape in ELEMENTWISE for problem in _elementwise(shape, dtype, device))


def _elementwise(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[Problem]:
    """add_relu and its gradient, then the batch norms."""
    kinds = [(Pointwise.IDENTITY, _ADD_RELU), (Pointwise.RELU_GRADIENT, Epilogue())]
    kinds += [(Pointwise.BATCH_NORM, epilogue) for epilogue in (Epilogue(), _RELU, _ADD_RELU)]
    return [Problem.of(operation, shape, dtype, device, epilogue) for operation, epilogue in kinds]


def _convs(backend: Backend, entry: Entry, problem: Problem) -> Iterator[Trial]:
    if backend.why_not(problem) is not None:
        return
    reference = backends.stock()
    x, parameters, residual = tensors(problem, entry.special)
    stock = reference.prepare(problem, parameters)(x, residual)
    wide = problem.with_dtype(torch.float64)
    truth = reference.prepare(wide, parameters.to(torch.float64))(x.double(), None if residual is None else residual.double())
    rounded = tf32.exact(problem, parameters)(x, residual) if tf32.used(problem) else None

    def compute(plan: str | None = None) -> Tensor:
        return backend.prepare(problem, parameters, plan)(x, residual)

    what = f"{entry.why}: {problem}"
    # What the backend takes by itself, and each by its name.
    found = (problem.label, problem.types.source, what)
    yield Trial(backend.name, "", *found, compute, stock, truth, rounded)
    for plan in backend.plans(problem):
        yield Trial(backend.name, plan, *found, partial(compute, plan), stock, truth, rounded)


def _add_relu(backend: Backend, problem: Problem) -> Iterator[Trial]:
    """add_relu of x and the residual, or add_relu_backward of the gradient and the result."""
    if backend.why_not(problem) is not None:
        return
    a, b = inputs_of(problem)
    assert b is not None
    b[0, 0, 0, 0] = torch.nan
    nothing, reference = NO_PARAMETERS, backends.stock()

    def compute() -> Tensor:
        return backend.prepare(problem, nothing)(a, b)

    stock = reference.prepare(problem, nothing)(a, b)
    truth = reference.prepare(problem.with_dtype(torch.float64), nothing)(a.double(), b.double())
    yield Trial(backend.name, "", problem.label, problem.types.source, str(problem), compute, stock, truth)


def _norms(backend: Backend, problems: list[Problem]) -> Iterator[Trial]:
    """The four passes, all on stock's statistics, so that errors don't add up. They are the same for all norm ops."""
    if any(backend.why_not(problem) is not None for problem in problems):
        return
    kernels: BatchNormPasses = backend.prepare(problems[0], NO_PARAMETERS)
    shape, dtype, device = problems[0].shape, problems[0].types.source, problems[0].device
    stock = StockPasses()
    x, residual, dy = (activations(shape, dtype, device, seed) for seed in range(3))
    x = x * 2 + 1
    weight, bias = (activations((1, shape[1], 1, 1), torch.float32, device, seed).flatten() for seed in (4, 5))
    mean, var = stock.statistics(x)
    y = stock.apply(x, residual, mean, var, weight, bias, _EPS, True)
    dweight, dbias, _ = stock.backward_reduce(dy, x, y, mean, var, _EPS, False)
    count = float(x.numel() // shape[1])

    def forward(k: Any, wide: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return k.apply(*map(wide, (x, residual, mean, var, weight, bias)), _EPS, True), *k.statistics(wide(x))

    def backward(k: Any, wide: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        sums = k.backward_reduce(*map(wide, (dy, x, y, mean, var)), _EPS, False)[:2]
        given = map(wide, (dy, x, y, mean, var, weight))
        return k.backward_apply(*given, (wide(dweight), wide(dbias), count), _EPS, False)[0], *sums

    for run, results in ((forward, ("y", "mean", "var")), (backward, ("dx", "dweight", "dbias"))):
        by_stock, truth = run(stock, lambda t: t), run(stock, lambda t: t.double())
        for i, result in enumerate(results):
            compute = partial(lambda run, i: run(kernels, lambda t: t)[i], run, i)
            for problem in problems:
                yield Trial(backend.name, "", problem.label, dtype, f"{result} of {problem}", compute, by_stock[i], truth[i])


def tensors(problem: Problem, special: bool = False) -> tuple[Tensor, ConvParameters, Tensor | None]:
    """x, parameters and residual, the same at every call; `special` puts NaN and Inf into x."""
    x, residual = inputs_of(problem)
    return with_nan_and_inf(x) if special else x, parameters_of(problem), residual
