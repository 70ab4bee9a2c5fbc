"""program: several fused ops in a row on the parameters of a model's own layers, as graphs carry them.

    outputs = program(inputs, parameters, steps)

`steps` is the text of a program of steps (`runtime/program.py`), whose layers name their convolution's and batch norm's tensors
among `parameters`. What is folded and packed from these is kept for as long as the first of them lives, and made again when one
changes. Results have stock's strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused.backends import Declined, Problem, choice
from resnet_fused.backends.problem import PRECISIONS, Types
from resnet_fused.ops.common import LIBRARY, register
from resnet_fused.runtime.calls import autocast_dtype
from resnet_fused.runtime.executor import Settings, settle
from resnet_fused.runtime.formats import result_format, strides_in
from resnet_fused.runtime.kept import Kept, Unservable
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.plain import stock_step
from resnet_fused.runtime.program import NONE, FusedStep, Program, from_text
from resnet_fused.runtime.run import Run

_kept = WeakIdKeyDictionary()
# Programs and sets of parameters that begin with one tensor.
_MOST = 64


def _eager(inputs: list[Tensor], parameters: list[Tensor], steps: str, precision: Any, backend: str) -> list[Tensor]:
    program = from_text(steps)
    own: dict[Any, Kept[Run]] = _kept.setdefault(parameters[0], {})
    key = (steps, precision, backend, *map(id, parameters))
    try:
        kept = own.get(key)
        if kept is None or not kept.holds(parameters):
            if len(own) >= _MOST:
                own.clear()
            kept = own[key] = Kept(parameters)
        kind = (
            *((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            *(choice(backend), autocast_dtype(inputs[0].device.type), torch.get_num_threads()),
        )
        run = kept.get(kind)
        if run is not None:
            return [*run(inputs)]
        if any(x.numel() == 0 for x in inputs):
            raise Unservable("an input is empty")
        folded = kept.once(lambda aliases: Parameters())
        run, results = settle(program, inputs, kept.aliases, folded, Settings(PRECISIONS[precision], backend))
    except (Declined, Unservable):
        return stock(program, inputs, parameters)
    kept.put(kind, run)
    return [*results]


def stock(program: Program, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The program in stock's ops."""
    values = [*inputs]
    for step in program.items:
        assert isinstance(step, FusedStep)
        residual = None if step.residual == NONE else values[step.residual]
        values.append(stock_step(step, parameters, values[step.x], residual, [values[number] for number in step.more]))
    return [values[value.number] for value in program.outputs]


def _fake(inputs: list[Tensor], parameters: list[Tensor], steps: str, precision: Any, backend: str) -> list[Tensor]:
    program = from_text(steps)
    values = [*inputs]
    for step in program.items:
        assert isinstance(step, FusedStep)
        x = values[step.x]
        step = step.of([values[number] for number in step.reads])
        first = step.layers[0]
        if not step.is_pass and first.conv.dims == 3:  # whose strides depend on the library that stock takes
            y = stock_step(step, parameters, x, None if step.residual == NONE else values[step.residual])
            values.append(torch.empty_strided(y.shape, y.stride(), dtype=x.dtype, device=x.device))
            continue
        padded, pad = [*x.shape], first.pad
        for place in range(0, len(pad), 2):
            padded[-1 - place // 2] += pad[place] + pad[place + 1]
        shape = Problem(step.steps, tuple(padded), Types.of(x.dtype), x.device).output_shape()
        strides = strides_in(shape, result_format(step, x, None, parameters))
        values.append(torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device))
    return [values[value.number] for value in program.outputs]


def _no_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "resnet_fused::program has no derivative; it is for inference. Call the model without torch.no_grad(), and the layers "
        "that may need one run as stock."
    )


register(
    "program(Tensor[] inputs, Tensor[] parameters, str steps, str precision, str backend) -> Tensor[]",
    _eager,
    _fake,
    lambda inputs, parameters, steps, precision, backend: stock(from_text(steps), inputs, parameters),
)
torch.library.register_autograd("resnet_fused::program", _no_derivative, lib=LIBRARY)
