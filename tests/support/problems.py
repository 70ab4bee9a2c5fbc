"""Problems by the names of the public ops, with convolutions as those list them: the main path, then the shortcut."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resnet_fused.backends import Activation, Conv, Epilogue, Pool, Precision, Problem, Step
from resnet_fused.backends.problem import RESIDUAL, Pointwise, Types, X, residual_block

_RELU, _ADD_RELU = Epilogue(activation=Activation.RELU), Epilogue(residual=True, activation=Activation.RELU)
_EPILOGUES = {
    "conv2d": Epilogue(bias=False),
    "conv2d_bn": Epilogue(),
    "conv2d_bn_relu": _RELU,
    "conv2d_bn_add_relu": _ADD_RELU,
    "bn": Epilogue(),
    "bn_relu": _RELU,
    "bn_add_relu": _ADD_RELU,
    "add_relu": _ADD_RELU,
}


def steps_of(op: str, convs: Sequence[Conv], shortcut: bool = False, pool: Pool | None = None) -> tuple[Step, ...]:
    """The steps of a public op."""
    if op in ("basic_block", "bottleneck"):
        return residual_block(convs[:-1], convs[-1]) if shortcut else residual_block(convs, None)
    if op == "stem":
        return (Step(convs[0], _RELU._replace(pool=pool)),)
    if op == "add_relu_backward":
        return (Step(Pointwise.RELU_GRADIENT, Epilogue(), (X, RESIDUAL)),)
    epilogue = _EPILOGUES[op]
    operation = convs[0] if convs else Pointwise.IDENTITY if op == "add_relu" else Pointwise.BATCH_NORM
    return (Step(operation, epilogue, (X, RESIDUAL) if epilogue.residual else (X,)),)


def problem_of(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    convs: Sequence[Conv] = (),
    shortcut: bool = False,
    pool: Pool | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    precision: Precision = "fast",
) -> Problem:
    """The problem that a public op poses."""
    n, c, h, w = shape
    return Problem(steps_of(op, convs, shortcut, pool), (n, c, h, w), Types.of(dtype), device, memory_format, precision)
