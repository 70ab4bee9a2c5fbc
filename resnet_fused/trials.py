"""The problems of `resnet-fused verify --device`: every kernel of a backend, with stock's result and the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.backends import tf32
from resnet_fused.backends.norm import NORM_OPS, NormKernels
from resnet_fused.backends.problem import Conv, Folded, Problem
from resnet_fused.backends.reference_bn import ReferenceNorm

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
    """A problem of convolutions; `special` puts NaN and Inf into x."""

    why: str
    shape: tuple[int, int, int, int]
    convs: tuple[Conv, ...]
    op: str = "conv2d_bn_add_relu"
    shortcut: bool = False
    special: bool = False


def _3x3(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (3, 3), (stride, stride), (1, 1))


def _1x1(channels_in: int, channels_out: int, stride: int = 1) -> Conv:
    return Conv(channels_in, channels_out, (1, 1), (stride, stride))


# What a ResNet has, and what is easily wrong: partial tiles, halos, odd channels, split k, one pixel.
ENTRIES = (
    Entry("stem", (2, 3, 64, 64), (Conv(3, 64, (7, 7), (2, 2), (3, 3)),), "conv2d_bn_relu"),
    Entry("3x3", (2, 64, 28, 28), (_3x3(64, 64),)),
    Entry("3x3 strided", (2, 128, 27, 29), (_3x3(128, 136, 2),), "conv2d_bn_relu"),
    Entry("1x1", (4, 256, 14, 14), (_1x1(256, 512),)),
    Entry("1x1 strided, no ReLU", (4, 64, 28, 28), (_1x1(64, 256, 2),), "conv2d_bn"),
    Entry("long k, few pixels", (1, 512, 7, 7), (_3x3(512, 512),)),
    Entry("one pixel", (1, 64, 1, 1), (_1x1(64, 40),)),
    Entry("odd channels", (2, 5, 13, 11), (_3x3(5, 23),)),
    Entry("dilated", (1, 24, 20, 18), (Conv(24, 48, (3, 3), (1, 1), (2, 2), (2, 2)),)),
    Entry("grouped", (2, 64, 14, 14), (Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 32),)),
    Entry("large image", (1, 64, 112, 112), (_3x3(64, 64),)),
    Entry("NaN and Inf", (1, 64, 14, 14), (_1x1(64, 64),), special=True),
    Entry("block", (2, 64, 20, 24), (_3x3(64, 64), _3x3(64, 64)), "basic_block"),
    Entry(
        "block, projected", (2, 64, 20, 24), (_3x3(64, 128, 2), _3x3(128, 128), _1x1(64, 128, 2)), "basic_block", True
    ),
    Entry("block", (2, 256, 14, 18), (_1x1(256, 64), _3x3(64, 64), _1x1(64, 256)), "bottleneck"),
    Entry(
        "block, projected", (2, 256, 14, 18), (_1x1(256, 128), _3x3(128, 128, 2), _1x1(128, 512), _1x1(256, 512, 2)),
        "bottleneck", True,
    ),
)  # fmt: skip
ELEMENTWISE = ((2, 64, 28, 28), (2, 31, 9, 7), (4, 8, 1, 1), (1, 2048, 7, 7))


def trials(name: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, Iterator[Trial]]]:
    """All problems of a backend on a device, each with the trials of its kernels, which are none where it isn't served.

    Making a trial runs stock's ops, and may raise what they raise.
    """
    backend = backends.get(name)
    for dtype in dtypes:
        for entry in ENTRIES:
            problem = Problem(entry.op, entry.shape, dtype, device, entry.convs, entry.shortcut)
            yield str(problem), _convs(backend, entry, problem)
        for shape in ELEMENTWISE:
            for op in ("add_relu", "add_relu_backward"):
                problem = Problem(op, shape, dtype, device)
                yield str(problem), _add_relu(backend, problem)
            norms = [Problem(op, shape, dtype, device) for op in NORM_OPS]
            if hasattr(backend, "norm"):
                yield str(norms[0]), _norms(backend, norms)


def _convs(backend: Any, entry: Entry, problem: Problem) -> Iterator[Trial]:
    if backend.unsupported(problem) is not None:
        return
    reference = backends.get("reference")
    x, folded, residual = tensors(problem, entry.special)
    stock = reference.prepare(problem, folded)(x, residual)
    wide = dataclasses.replace(problem, dtype=torch.float64)
    truth = reference.prepare(wide, folded.to(torch.float64))(x.double(), None if residual is None else residual.double())
    rounded = tf32.exact(problem, folded)(x, residual) if tf32.used(problem) else None

    def compute(*variant: str) -> Tensor:
        return backend.prepare(problem, folded, *variant)(x, residual)

    variants = backend.variants(problem) if hasattr(backend, "variants") else []
    what = f"{entry.why}: {problem}"
    # What the backend takes by itself, and each by its name.
    yield Trial(backend.name, "", entry.op, problem.dtype, what, compute, stock, truth, rounded)
    for variant in variants:
        yield Trial(backend.name, variant, entry.op, problem.dtype, what, partial(compute, variant), stock, truth, rounded)


def _add_relu(backend: Any, problem: Problem) -> Iterator[Trial]:
    """add_relu of x and the residual, or add_relu_backward of the gradient and the result."""
    if backend.unsupported(problem) is not None:
        return
    a, b = (_activation(problem.shape, problem.dtype, problem.device, seed) for seed in range(2))
    b[0, 0, 0, 0] = torch.nan
    nothing, reference = Folded((), ()), backends.get("reference")

    def compute() -> Tensor:
        return backend.prepare(problem, nothing)(a, b)

    stock = reference.prepare(problem, nothing)(a, b)
    truth = reference.prepare(dataclasses.replace(problem, dtype=torch.float64), nothing)(a.double(), b.double())
    yield Trial(backend.name, "", problem.op, problem.dtype, str(problem), compute, stock, truth)


def _norms(backend: Any, problems: list[Problem]) -> Iterator[Trial]:
    """The four passes, all on stock's statistics, so that errors don't add up. They are the same for all norm ops."""
    if any(backend.unsupported(problem) is not None for problem in problems):
        return
    kernels: NormKernels = backend.norm()
    shape, dtype, device = problems[0].shape, problems[0].dtype, problems[0].device
    stock = ReferenceNorm()
    x, residual, dy = (_activation(shape, dtype, device, seed) for seed in range(3))
    x = x * 2 + 1
    weight, bias = (_activation((1, shape[1], 1, 1), torch.float32, device, seed).flatten() for seed in (4, 5))
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
                yield Trial(backend.name, "", problem.op, dtype, f"{result} of {problem}", compute, by_stock[i], truth[i])


def tensors(problem: Problem, special: bool = False) -> tuple[Tensor, Folded, Tensor | None]:
    """x, parameters and residual, the same everywhere."""
    x = _activation(problem.shape, problem.dtype, problem.device, 0)
    if special:
        x[0, 0, 3, 5], x[-1, -1, -1, -1] = torch.nan, torch.inf
    weights, shifts = [], []
    for i, conv in enumerate(problem.convs):
        shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel
        fan_in = torch.Size(shape[1:]).numel()
        weights.append(_activation(shape, problem.dtype, problem.device, 3 * i + 1) / fan_in**0.5)
        shifts.append(_activation((1, shape[0], 1, 1), problem.dtype, problem.device, 3 * i + 2).flatten())
    residual = _activation(problem.output_shape(), problem.dtype, problem.device, 3) if "add" in problem.op else None
    return x, Folded(tuple(weights), tuple(shifts)), residual


def _activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu")
    return t.to(device, dtype, memory_format=torch.channels_last)
