"""Operators of frozen models: values, NaN and values that a kernel declines, fake results, instruction sets, arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused.backends import STOCK, Activation, Conv, ConvParameters, Implementation, Pool, Problem, get
from resnet_fused.backends.cpu.block import WholeBlock
from resnet_fused.backends.cpu.convolution import Direct, Winograd
from resnet_fused.backends.cpu.elementwise import OnePass
from resnet_fused.backends.cpu.grouped import Depthwise, Grouped
from resnet_fused.backends.cpu.head import AveragePool
from resnet_fused.backends.cpu.stem import Stem
from resnet_fused.backends.freezing import freeze_kernels
from resnet_fused.backends.problem import Epilogue, Pointwise, Types

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A problem of one implementation. `declines`: whether a NaN or a sentinel is left to stock's convolution."""

    implementation: Implementation
    op: str
    shape: tuple[int, ...]
    convs: tuple[Conv, ...]
    declines: bool
    shortcut: bool = False
    pool: Pool | None = None


_POINTWISE, _SAME = Conv(64, 32, (1, 1)), Conv(32, 32, (3, 3), padding=(1, 1))
_STEM = Conv(3, 40, (7, 7), (2, 2), (3, 3))
CASES = {
    "winograd": Case(Winograd(), "conv2d_bn_relu", (2, 32, 13, 12), (Conv(32, 40, (3, 3), padding=(1, 1)),), True),
    "winograd-residual": Case(Winograd(), "conv2d_bn_add_relu", (2, 32, 13, 12), (_SAME,), True),
    "winograd-stride-2": Case(Winograd(), "conv2d_bn", (1, 32, 14, 15), (Conv(32, 64, (3, 3), (2, 2), (1, 1)),), True),
    "direct": Case(Direct(), "conv2d_bn_add_relu", (2, 24, 9, 10), (Conv(24, 24, (5, 3), padding=(2, 1)),), False),
    "direct-dilated": Case(Direct(), "conv2d_bn", (1, 24, 9, 10), (Conv(24, 24, (3, 3), (2, 1), (2, 2), (2, 2)),), False),
    "depthwise": Case(Depthwise(), "conv2d_bn_relu", (2, 24, 9, 10), (Conv(24, 24, (3, 3), (2, 2), (1, 1), groups=24),), False),
    "grouped": Case(Grouped(), "conv2d_bn_relu", (2, 32, 9, 10), (Conv(32, 32, (3, 3), padding=(1, 1), groups=4),), False),
    "stem": Case(Stem(), "stem", (2, 3, 31, 40), (_STEM,), True),
    "stem-with-pool": Case(Stem(), "stem", (2, 3, 31, 40), (_STEM,), True, pool=Pool((3, 3), (2, 2), (1, 1))),
    "basic-block": Case(WholeBlock(), "basic_block", (2, 32, 13, 12), (_SAME, _SAME), True),
    "bottleneck": Case(WholeBlock(), "bottleneck", (2, 64, 13, 12), (_POINTWISE, _SAME, Conv(32, 64, (1, 1))), True),
    "projection": Case(
        WholeBlock(), "bottleneck", (2, 64, 13, 12), (_POINTWISE, _SAME, Conv(32, 96, (1, 1)), Conv(64, 96, (1, 1))), True, True
    ),
}


class Frozen:
    """A case in its frozen form and in stock's ops, on the same random tensors."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.problem = problem_of(case.op, case.shape, torch.float32, CPU, case.convs, case.shortcut, case.pool)
        weights, biases = [], []
        for conv in self.problem.convs:
            inside = conv.in_channels // conv.groups
            weight = torch.randn(conv.out_channels, inside, *conv.kernel) * (inside * conv.kernel[0] * conv.kernel[1]) ** -0.5
            weights.append(weight)
            biases.append(torch.randn(conv.out_channels))
        self.parameters = ConvParameters(weights, biases)
        self.x = torch.randn(case.shape).contiguous(memory_format=torch.channels_last)
        residual = self.problem.reads_residual
        self.residual = (
            torch.randn(self.problem.output_shape()).contiguous(memory_format=torch.channels_last) if residual else None
        )
        assert case.implementation.why_not(self.problem) is None
        self.kernel = case.implementation.prepare(self.problem, self.parameters, None)

    def ours(self) -> Tensor:
        with freeze_kernels():
            return self.kernel(self.x, self.residual)

    def stock(self, dtype: torch.dtype) -> Tensor:
        residual = None if self.residual is None else self.residual.to(dtype)
        problem = replace(self.problem, types=Types.of(dtype))
        return get(STOCK).prepare(problem, self.parameters.to(dtype))(self.x.to(dtype), residual)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_what_kernels_decline(case: Case, isa: str):
    frozen = Frozen(case)
    assert_as_good_as_stock(frozen.ours(), frozen.stock(torch.float32), frozen.stock(torch.float64))
    clean = frozen.x
    for value in (float("nan"), float("inf"), 1e10):
        frozen.x = clean.clone()
        frozen.x[0, 1, 5, 6] = value
        want = frozen.stock(torch.float32)
        if case.declines:
            # By stock's own convolution, so bit by bit; NaN and Inf reach no pixel that they don't reach in stock.
            torch.testing.assert_close(frozen.ours(), want, rtol=0, atol=0, equal_nan=True)
        else:
            assert_as_good_as_stock(frozen.ours(), want, frozen.stock(torch.float64))


@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
def test_bfloat16(winograd: bool):
    """A whole case in bfloat16, with what Winograd declines."""
    conv = Conv(32, 40, (3, 3), padding=(1, 1))
    problem = problem_of("conv2d_bn_relu", (2, 32, 13, 12), torch.bfloat16, CPU, (conv,))
    implementation = Winograd() if winograd else Direct()
    reason = get("cpu").unavailable() or implementation.why_not(problem)
    if reason is not None:
        pytest.skip(f"this CPU doesn't serve it: {reason}; run the tests on one with AVX512_BF16")
    weight, bias = (torch.randn(40, 32, 3, 3) / 17).bfloat16(), torch.randn(40).bfloat16()
    kernel = implementation.prepare(problem, ConvParameters([weight], [bias]), None)
    for value in (0.5, float("nan"), 1e10):
        x = torch.randn(2, 32, 13, 12).bfloat16().contiguous(memory_format=torch.channels_last)
        x[0, 1, 5, 6] = value
        want = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
        truth = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
        with freeze_kernels():
            assert_as_good_as_stock(kernel(x, None), want, truth)


def _calls() -> dict[str, tuple[object, tuple[object, ...]]]:
    """Operators with arguments, as kernels call them."""
    found: dict[str, tuple[object, tuple[object, ...]]] = {}

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "frozen" in str(func):
                found.setdefault(str(func), (func, args))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 24, 9, 10).contiguous(memory_format=torch.channels_last)
    with Note(), freeze_kernels():
        for case in CASES.values():
            Frozen(case).ours()
        get("cpu").frozen_input(x.contiguous(), x)
        AveragePool().prepare(Problem.of(Pointwise.AVERAGE_POOL, (2, 24, 9, 10), x.dtype, CPU), ConvParameters((), ()), None)(
            x, None
        )
        gate = Problem.of(Pointwise.IDENTITY, (2, 24, 9, 10), x.dtype, CPU, Epilogue(activation=Activation.SILU, gate=True))
        OnePass().prepare(gate, ConvParameters((), ()), None)(x, None, torch.randn(2, 24, 1, 1))
    return found


def test_operators_are_functions_with_right_fake_results():
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)
    calls = _calls()
    assert {name.split(".")[1] for name in calls} == {
        *("frozen_input", "frozen_conv", "frozen_block", "frozen_stem", "frozen_pass", "frozen_average_pool")
    }
    for operator, arguments in calls.values():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["winograd", "stem", "basic-block"])
def test_weights_of_another_instruction_set_are_refused(name: str):
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)
    frozen, library = Frozen(CASES[name]), torch.ops.resnet_fused_cpu
    frozen.ours()
    library.limit_isa(0)
    try:
        with pytest.raises(
            ValueError, match=r"isa is \d: the model was frozen for .* freeze the model on a machine with this CPU"
        ):
            frozen.ours()
    finally:
        library.limit_isa(2)


def test_inputs_unlike_the_example_are_refused():
    reason = get("cpu").unavailable()
    if reason is not None:
        pytest.skip(reason)
    example = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    given = torch.randn(2, 3, 8, 18)[..., ::2]
    copied = get("cpu").frozen_input(given, example)
    assert copied.stride() == example.stride()
    assert torch.equal(copied, given)
    for other in (example[:1], example[0], example.double()):
        with pytest.raises(ValueError, match=r"an input has shape .* the model was frozen for \(2, 3, 8, 9\) and Float"):
            get("cpu").frozen_input(other, example)
