"""Programs: what a forward computes, as fused steps and calls on numbered values.

Values are numbered: first the inputs, then the result of each item. A program of fused steps alone can be written as text, by
which a registered operator carries it through graphs and files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.backends import Activation, Conv, Epilogue, Pool
from resnet_fused.backends.problem import Affine, Pointwise, Step, X
from resnet_fused.runtime.views import View, view_of

NONE = -1


class Layer(NamedTuple):
    """One convolution with its batch norm, if it has one, and what follows it; or what stands by itself, with what follows it.

    Attributes:
        operation: geometry of the convolution; a batch norm by itself, after a concatenation or without; or the identity, where
            there is an epilogue only.
        pad, pad_mode: what F.pad adds before (left, right, top, bottom; of each dimension, the last one first), for padding
            modes and uneven padding.
        eps: of the batch norm.
        tensors: numbers of weight, bias, mean, var, gamma, beta and the count of training steps among the program's parameters;
            NONE where there is none. Training moves mean and variance without their version counters, and counts its steps.
        promotes: whether the batch norm's result has the wider of its input's dtype and its own.
        renews: whether what follows makes a tensor of its own in stock.
        epilogue: what follows.
        reads: numbers of the values that it reads, as a problem's steps have them.
    """

    operation: Conv | Affine | Pointwise
    pad: tuple[int, ...]
    pad_mode: str
    eps: float
    tensors: tuple[int, ...]
    promotes: bool = False
    renews: bool = False
    epilogue: Epilogue = Epilogue()
    reads: tuple[int, ...] = (X,)

    @property
    def step(self) -> Step:
        """As a problem has it: without its batch norm, which is folded in."""
        return Step(self.operation, self.epilogue, self.reads)

    @property
    def conv(self) -> Conv:
        """Geometry of the convolution of a layer that has one."""
        assert isinstance(self.operation, Conv)
        return self.operation

    @property
    def normed(self) -> bool:
        """Whether there is a batch norm."""
        return self.tensors[2] != NONE


class FusedStep(NamedTuple):
    """Layers that one kernel, or a few, compute.

    Attributes:
        layers: in the order in which they are computed; the last one's result is the step's.
        x, residual: numbers of the values that it reads; NONE where it has no second input.
        more: of those that it reads beside them: what is concatenated after x, and a gate.
    """

    layers: tuple[Layer, ...]
    x: int
    residual: int = NONE
    more: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x, *self.more) if self.residual == NONE else (self.x, self.residual, *self.more)

    def of(self, given: Sequence[Tensor]) -> FusedStep:
        """The step with what only the values that it reads tell: how many channels each of those has that it concatenates."""
        layer = self.layers[0]
        if not isinstance(layer.operation, Affine):
            return self
        sources = [given[0], *given[1 + (self.residual != NONE) :]]
        return self._replace(layers=(layer._replace(operation=Affine(tuple(x.shape[1] for x in sources))),))

    @property
    def is_pass(self) -> bool:
        """Whether it is no convolution, but a pass over values."""
        return not isinstance(self.layers[0].operation, Conv)

    @property
    def view(self) -> View:
        """How kernels for images see its values: all of its layers in the same way."""
        return View.SAME if self.is_pass else view_of(self.layers[0].conv)

    @property
    def steps(self) -> tuple[Step, ...]:
        """As a problem has them."""
        return tuple(layer.step for layer in self.layers)


class Call(NamedTuple):
    """A call of something that isn't fused.

    Attributes:
        target: a module's path, a function, or the name of a method.
        kind: "call_module", "call_function", "call_method" or "get_attr", as fx has them.
        args, kwargs: with `Value` in the place of values.
        reads: numbers of the values among them.
        transparent: whether what it computes, and the format of its result, don't depend on its input's memory format.
        elementwise: whether it is computed value by value, so that its result has its input's format in any dimensions.
        fast: whether it is a layer, without hooks, that a kernel of ours may take over.
        pure: whether nobody notices if it is called twice: it draws no random numbers and runs no code of the model's.
        writes: whether it may write to its inputs.
    """

    target: Any
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    transparent: bool
    elementwise: bool = False
    fast: bool = False
    pure: bool = True
    writes: bool = True


class Value(NamedTuple):
    """A value among the arguments of a call, or in a result."""

    number: int


class Program(NamedTuple):
    """What a forward computes.

    Attributes:
        inputs: how many.
        items: fused steps and calls in their order.
        outputs: the result: `Value` in tuples, lists, dicts, dataclasses.
        plain: by the number of a fused step's value, the same in stock: a program of calls on what the step reads.
        batches: whether it holds only where every convolution reads a batch.
    """

    inputs: int
    items: tuple[FusedStep | Call, ...]
    outputs: Any
    plain: Mapping[int, Program] = {}
    batches: bool = False


def to_text(inputs: int, steps: Sequence[FusedStep], outputs: Sequence[int]) -> str:
    """A program of fused steps as text; `outputs` are numbers of values."""
    return json.dumps([inputs, steps, outputs], separators=(",", ":"))


@functools.lru_cache(maxsize=256)
def from_text(text: str) -> Program:
    """Inverse of `to_text`."""
    inputs, steps, outputs = json.loads(text)
    return Program(inputs, tuple(map(_step, steps)), tuple(map(Value, outputs)))


def _step(fields: Sequence[Any]) -> FusedStep:
    layers, x, residual, more = fields
    return FusedStep(tuple(map(_layer, layers)), x, residual, tuple(more))


def _layer(fields: Sequence[Any]) -> Layer:
    operation, pad, pad_mode, eps, tensors, promotes, renews, epilogue, reads = fields
    residual, activation, pool, bias, slope, gate = epilogue
    window = None if pool is None else Pool(*map(tuple, pool))
    following = Epilogue(residual, Activation(activation), window, bias, slope, gate)
    return Layer(_operation(operation), tuple(pad), pad_mode, eps, tuple(tensors), promotes, renews, following, tuple(reads))


def _operation(written: Any) -> Conv | Affine | Pointwise:
    if isinstance(written, str):
        return Pointwise(written)
    if len(written) == 1:
        return Affine(tuple(written[0]))
    in_channels, out_channels, kernel, stride, padding, dilation, groups = written
    return Conv(in_channels, out_channels, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)


def fill(template: Any, value_of: Callable[[int], Any]) -> Any:
    """A structure with its `Value`s replaced; containers are new ones."""
    if type(template) is Value:
        return value_of(template.number)
    if isinstance(template, tuple) and type(template) is not torch.Size:
        items = [fill(item, value_of) for item in template]
        return type(template)(*items) if hasattr(template, "_fields") else tuple(items)
    if type(template) is list:
        return [fill(item, value_of) for item in template]
    if isinstance(template, dict):
        return type(template)((key, fill(item, value_of)) for key, item in template.items())
    if isinstance(template, slice):
        return slice(*(fill(part, value_of) for part in (template.start, template.stop, template.step)))
    if hasattr(template, "__dataclass_fields__") and not isinstance(template, type):
        made = object.__new__(type(template))
        for name, item in vars(template).items():
            object.__setattr__(made, name, fill(item, value_of))
        return made
    return template


def caller(call: Call, module: nn.Module | None) -> Callable[..., Any]:
    """The call as a function of the values that it reads."""
    target, kind, args, kwargs = call.target, call.kind, call.args, call.kwargs
    places = {number: place for place, number in enumerate(call.reads)}
    if kind == "get_attr":
        owner, _, name = target.rpartition(".")
        assert module is not None
        held = module.get_submodule(owner)
        return lambda: getattr(held, name)
    function: Any = target
    if kind == "call_module":
        assert module is not None
        function = module.get_submodule(target)
    elif kind == "call_method":

        def function(x: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(x, target)(*args, **kwargs)

    if not kwargs and args == tuple(map(Value, call.reads)):
        return function  # its arguments are the values as they are

    def call_with(*values: Any) -> Any:
        def value_of(number: int) -> Any:
            return values[places[number]]

        return function(*fill(args, value_of), **fill(kwargs, value_of))

    return call_with
