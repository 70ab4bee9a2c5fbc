"""Finds kernels for what is no convolution: gates and batch norms by themselves (passes).

Where no kernel of ours is better than stock's ops, or a shape is one whose memory format in stock isn't that of its input, they
run as the calls that they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Precision, Problem, choice
from resnet_fused.backends.binding import Bound, bind_if_better
from resnet_fused.backends.problem import MORE, Affine, Types
from resnet_fused.runtime.calls import autocast_dtype
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.program import FusedStep


class BoundPass(NamedTuple):
    """A pass with its kernel. `format`: that which its result has in stock."""

    problem: Problem
    bound: Bound
    parameters: ConvParameters
    format: torch.memory_format


class Refused(Exception):
    """A pass is left to stock's ops. `unequal`: since what it adds has another shape."""

    def __init__(self, unequal: bool = False) -> None:
        super().__init__()
        self.unequal = unequal


def bind_pass(
    step: FusedStep,
    given: Sequence[Any],
    formats: Sequence[torch.memory_format | None],
    parameters: Sequence[Tensor],
    folded: Parameters,
    precision: Precision,
    backend: str,
) -> BoundPass:
    """The kernel of a pass.

    Args:
        step: the pass.
        given: what it reads, x first.
        formats: those that these have in stock; None where they are as in stock.
        parameters: the program's.
        folded: where folded and packed parameters are kept.
        precision, backend: of the settings.

    Raises:
        Refused: no kernel serves it.
    """
    format = _common_format(given, formats)
    step = step.of(given)
    (layer,), x = step.layers, given[0]
    norm = [parameters[number] for number in layer.tensors[2:6] if number >= 0]
    if any(p.device != x.device or p.dtype not in (x.dtype, torch.float32) for p in norm) or (norm and layer.promotes):
        raise Refused
    n, c, h, w = x.shape
    problem = Problem(step.steps, (n, c, h, w), Types.of(x.dtype), x.device, precision=precision)
    shapes, others = problem.shapes(), [*given[1:]]
    if layer.epilogue.residual and others.pop(0).shape != shapes[-1]:
        raise Refused(unequal=True)
    if [tuple(t.shape) for t in others] != shapes[MORE:-1]:
        raise Refused
    if isinstance(layer.operation, Affine) and sum(layer.operation.channels) != norm[0].numel():
        raise Refused
    own = folded.step(step.layers, parameters, x.dtype)
    bound = bind_if_better(problem, own, choice(backend))
    if bound is None:
        raise Refused
    return BoundPass(problem, bound, own, format)


def _common_format(given: Sequence[Any], formats: Sequence[torch.memory_format | None]) -> torch.memory_format:
    """The memory format of a pass over these in stock: the one that all of them have."""
    x = given[0]
    if not all(isinstance(t, Tensor) and t.dim() == 4 and t.layout is torch.strided and t.numel() > 0 for t in given):
        raise Refused
    if any(t.dtype != x.dtype or t.device != x.device for t in given) or autocast_dtype(x.device.type) is not None:
        raise Refused
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise Refused  # the kernels take channels_last
    # Where a size is 1, what strides a result has in stock depends on more than the formats.
    if 1 in x.shape[1:]:
        raise Refused
    found = set()
    for t, format in zip(given, formats, strict=True):
        if t.shape[2:] == x.shape[2:]:
            contiguous = torch.contiguous_format if t.is_contiguous() else torch.channels_last
            found.add(format or contiguous)
            if 1 in t.shape[1:] or not (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)):
                raise Refused
    if len(found) > 1:
        raise Refused
    return found.pop()
