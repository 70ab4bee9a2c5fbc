"""The functions of epilogues in the compiled kernels: every kernel that applies them, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import assert_as_good_as_stock

from resnet_fused.backends import Activation, Conv, ConvParameters, Epilogue, Problem, get
from resnet_fused.backends.accuracy import inputs_of, parameters_of

FUNCTIONS = [function for function in Activation if function in get("cpu").activations]
SLOPE = 0.1
# A kernel each, some with rows or channels beyond whole vectors and tiles.
CONVS = {
    "pointwise": (Conv(16, 40, (1, 1)), (2, 16, 9, 7)),
    "direct": (Conv(20, 70, (5, 5), (1, 1), (2, 2)), (1, 20, 9, 9)),
    "Winograd": (Conv(16, 40, (3, 3), (1, 1), (1, 1)), (2, 16, 13, 11)),
    "Winograd strided": (Conv(16, 40, (3, 3), (2, 2), (1, 1)), (1, 16, 13, 11)),
    "stem": (Conv(3, 32, (7, 7), (2, 2), (3, 3)), (1, 3, 32, 30)),
    "depthwise": (Conv(21, 21, (3, 3), (1, 1), (1, 1), (1, 1), 21), (2, 21, 9, 13)),
    "grouped": (Conv(32, 32, (3, 3), (2, 2), (1, 1), (1, 1), 4), (2, 32, 9, 13)),
}


def _problem(conv: Conv, shape: tuple[int, int, int, int], function: Activation, residual: bool, dtype: torch.dtype) -> Problem:
    epilogue = Epilogue(residual, function, slope=SLOPE if function is Activation.LEAKY_RELU else 0.0)
    return Problem.of(conv, shape, dtype, torch.device("cpu"), epilogue)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=[function.value for function in FUNCTIONS])
@pytest.mark.parametrize(("conv", "shape"), CONVS.values(), ids=CONVS)
def test_as_good_as_stock(isa: str, conv: Conv, shape: tuple[int, int, int, int], function: Activation, residual: bool) -> None:
    cpu, reference = get("cpu"), get("reference")
    for dtype in (torch.float32, torch.bfloat16):
        problem = _problem(conv, shape, function, residual, dtype)
        if cpu.why_not(problem) is not None:
            assert dtype == torch.bfloat16 or (residual and conv.kernel == (7, 7)), cpu.why_not(problem)
            continue
        x, added = inputs_of(problem)
        x, parameters = x * 3, parameters_of(problem)
        stock = reference.prepare(problem, parameters)(x, added)
        wide = reference.prepare(problem.with_dtype(torch.float64), parameters.to(torch.float64))
        truth = wide(x.double(), None if added is None else added.double())
        for plan in cpu.plans(problem) or [None]:
            assert_as_good_as_stock(cpu.prepare(problem, parameters, plan)(x, added), stock, truth)


@pytest.mark.parametrize("function", FUNCTIONS, ids=[function.value for function in FUNCTIONS])
def test_special_values_are_as_in_stock(isa: str, function: Activation) -> None:
    values = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30, 100.0, -100.0, 88.5, -87.5, 3.0, -3.0, 6.0, 1e-30]
    x = torch.tensor(values).view(1, 1, 3, 5)
    problem = _problem(Conv(1, 24, (1, 1)), (1, 1, 3, 5), function, False, torch.float32)
    parameters = ConvParameters((torch.ones(24, 1, 1, 1),), (torch.zeros(24),))
    y = get("cpu").prepare(problem, parameters)(x, None)
    torch.testing.assert_close(y, get("reference").prepare(problem, parameters)(x, None), equal_nan=True)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(ValueError, match="activation is 'softplus'; it must be one of"):
        torch.ops.resnet_fused_cpu.stem(
            torch.ones(1, 3, 9, 9), torch.ones(32 * 36 * 12), torch.ones(32), 32, False, "softplus", 0.0
        )
