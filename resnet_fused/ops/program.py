"""program: several fused ops in a row on the parameters of a model's own layers, as graphs carry them.

    outputs = program(inputs, parameters, steps)

`steps` is the text of a program of steps (`runtime/program.py`), whose layers name their convolution's and batch norm's tensors
among `parameters`. What is folded and packed from these is kept for as long as the first of them lives, and made anew when one
changes. Results have stock's strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused.backends import Declined, Problem, choice, records
from resnet_fused.ops.common import LIBRARY, register
from resnet_fused.runtime.calls import MAX_KERNELS, autocast_dtype, stamp
from resnet_fused.runtime.executor import Settings, settle
from resnet_fused.runtime.parameters import Look, Parameters, Unservable
from resnet_fused.runtime.plain import stock_step
from resnet_fused.runtime.program import NONE, Program, Step, from_text, result_format
from resnet_fused.runtime.run import Run


class _State:
    """What is kept for one program on one set of parameters.

    Its tensors are aliases, so that what is kept for parameters doesn't keep them alive.

    Raises:
        RuntimeError: a parameter was made under inference_mode and doesn't count its changes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.stamp = stamp(parameters)
        self.aliases = [p.detach() for p in parameters]
        self.look = Look(self.aliases)
        self.folded = Parameters()
        self.runs: dict[Any, Run] = {}
        self.generation = records.generation()

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        # The aliases count their own changes only.
        return stamp(parameters) == self.stamp and self.look.unchanged()


_states = WeakIdKeyDictionary()


def _eager(inputs: list[Tensor], parameters: list[Tensor], steps: str, precision: Any, backend: str) -> list[Tensor]:
    program = from_text(steps)
    own: dict[Any, _State] = _states.setdefault(parameters[0], {})
    key = (steps, precision, backend, *map(id, parameters))
    try:
        state = _state(own, key, parameters)
        kind = (
            *((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            *(choice(backend), records.generation(), autocast_dtype(inputs[0].device.type), torch.get_num_threads()),
        )
        run = state.runs.get(kind)
        if run is not None:
            return [*run(inputs)]
        if any(x.numel() == 0 for x in inputs):
            raise Unservable("an input is empty")
        if state.generation != records.generation():
            state.runs, state.generation = {}, records.generation()
        run, results = settle(program, inputs, state.aliases, state.folded, Settings(precision, backend))
    except (Declined, Unservable):
        return stock(program, inputs, parameters)
    if len(state.runs) >= MAX_KERNELS:
        state.runs.clear()
    state.runs[kind] = run
    return [*results]


def _state(own: dict[Any, _State], key: Any, parameters: list[Tensor]) -> _State:
    state = own.get(key)
    try:
        if state is None or not state.holds(parameters):
            if len(own) >= MAX_KERNELS:
                own.clear()
            state = own[key] = _State(parameters)
    except RuntimeError as error:
        raise Unservable(f"a parameter was made under inference_mode: {error}") from error
    return state


def stock(program: Program, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The program in stock's ops."""
    values = [*inputs]
    for step in program.items:
        assert isinstance(step, Step)
        residual = None if step.residual == NONE else values[step.residual]
        values.append(stock_step(step, parameters, values[step.x], residual))
    return [values[value.number] for value in program.outputs]


def _fake(inputs: list[Tensor], parameters: list[Tensor], steps: str, precision: Any, backend: str) -> list[Tensor]:
    program = from_text(steps)
    values = [*inputs]
    for step in program.items:
        assert isinstance(step, Step)
        x = values[step.x]
        convs = tuple(own.conv for own in step.layers)
        n, c, h, w = x.shape
        if step.layers[0].pad:
            left, right, top, bottom = step.layers[0].pad
            h, w = h + top + bottom, w + left + right
        problem = Problem(step.op, (n, c, h, w), x.dtype, x.device, convs, step.shortcut, step.pool)
        format = result_format(step, x, None, parameters)
        values.append(torch.empty(problem.output_shape(), dtype=x.dtype, device=x.device, memory_format=format))
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
)
torch.library.register_autograd("resnet_fused::program", _no_derivative, lib=LIBRARY)
