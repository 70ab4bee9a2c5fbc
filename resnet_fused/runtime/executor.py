"""Finds the kernels of a program for a kind of input, at its first call, and runs it with them.

Inside of a program results of steps are channels_last, the kernels' own format. What is called beside them, and what is given
to the caller, has the strides that it would have in stock PyTorch.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.backends import BackendError, ConvParameters, Declined, JoinableKernel, Kernel, Precision, Problem, choice
from resnet_fused.backends.binding import Bound, bind
from resnet_fused.backends.freezing import freezing
from resnet_fused.backends.problem import FIRST_RESULT, Types, X
from resnet_fused.runtime.calls import autocast_dtype
from resnet_fused.runtime.formats import channels_are_last, format_of, in_format, result_format, same_in_both
from resnet_fused.runtime.kept import Unservable
from resnet_fused.runtime.layers import Mean, bind_linear, bind_mean, mean_of
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.passes import Refused, bind_pass
from resnet_fused.runtime.plain import plain_calls, plain_layers, plain_padded
from resnet_fused.runtime.program import NONE, Call, FusedStep, Program, Value, caller, fill
from resnet_fused.runtime.run import Operation, Run, without_residual
from resnet_fused.runtime.sizes import asks_for_sizes, shape_follows
from resnet_fused.runtime.views import View, in_view, viewed_problem

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass
class Settings:
    """What the choice of kernels follows, beside the input.

    `backend`: a backend's name, or "auto". `replay`: whether runs may become CUDA graphs.
    """

    precision: Precision = "fast"
    backend: str = "auto"
    replay: bool = False


def settle(
    program: Program,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    folded: Parameters,
    settings: Settings,
    module: nn.Module | None = None,
) -> tuple[Run, Any]:
    """Runs a program for the first time on inputs of a kind, and gives the run for all later ones, and this one's result.

    Args:
        program: the program.
        inputs: its inputs.
        parameters: what its layers' `tensors` number.
        folded: where folded and packed parameters are kept.
        settings: of the model.
        module: the module whose forward it is, for its calls.

    Raises:
        Unservable: the program can't be run on this kind of input, and nothing that anybody could notice was done.
        BackendError: an explicitly chosen backend can't serve a step.
    """
    return _Settling(program, inputs, parameters, folded, settings, module).run()


class _NoBatch(Unservable):
    """A convolution's input has another number of dimensions than a batch."""


class _Settling:
    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        folded: Parameters,
        settings: Settings,
        module: nn.Module | None,
    ) -> None:
        self.program, self.parameters, self.folded, self.settings, self.module = program, parameters, folded, settings, module
        self.values: list[Any] = [*inputs, *(None,) * len(program.items)]
        # The format that stock's tensor has; None where this one is as in stock.
        self.formats: list[torch.memory_format | None] = [None] * len(self.values)
        self.operations: list[Operation] = []
        self.made = Run(program)
        # Numbers of values in channels_last that were made of others, by those others' numbers.
        self.converted: dict[int, int] = {}
        self.step_readers = Counter(item.x for item in program.items if isinstance(item, FusedStep))
        # How often each value is read, by its number; the result reads, too.
        self.readers = Counter(number for item in program.items for number in item.reads)
        fill(program.outputs, lambda number: self.readers.update((number,)))
        self.shaped = {*range(program.inputs)}  # numbers of values whose shapes follow from the kind of the inputs

    def run(self) -> tuple[Run, Any]:
        begun = False  # whether something was done that mustn't be done twice
        for index, item in enumerate(self.program.items):
            number = self.program.inputs + index
            try:
                if isinstance(item, FusedStep):
                    self._pass(item, number) if item.is_pass else self._step(item, number)
                else:
                    begun = begun or not item.pure
                    self._call(item, number)
            except (BackendError, Unservable):
                raise
            except Exception as error:
                if begun:
                    raise
                # The module's own forward raises the error that users know, or there is something that only it can do.
                raise Unservable(f"{type(error).__name__}: {error}") from error
            if shape_follows(item, self.shaped, self.made.constants):
                self.shaped.add(number)
        kept: set[int] = set()

        def result(number: int) -> Any:
            self._as_stock(number)
            kept.add(number)
            return self.values[number]

        output = fill(self.program.outputs, result)
        self.made.finish(self.operations, kept, len(self.values))
        if self.settings.replay and all(isinstance(item, FusedStep) or item.pure for item in self.program.items):
            self.made.may_replay(self.values[: self.program.inputs], kept, self._held())
        return self.made, output

    def _held(self) -> list[Tensor]:
        """Tensors of the model that calls read where they lie."""
        held: list[Any] = []
        for number, item in enumerate(self.program.items, self.program.inputs):
            if isinstance(item, FusedStep):
                if item.is_pass:  # which may run as calls
                    held += [self.parameters[n] for n in item.layers[0].tensors if n != NONE]
                continue
            if item.kind == "get_attr":
                held.append(self.values[number])
            elif item.kind == "call_module" and self.module is not None:
                layer = self.module.get_submodule(item.target)
                held += [*layer.parameters(), *layer.buffers()]
        return [t for t in held if isinstance(t, Tensor)]

    def _do(self, operation: Operation) -> None:
        given = [self.values[number] for number in operation.reads]
        try:
            result = operation.run(*given)
        except Declined:
            assert operation.plain is not None
            result = operation.plain(*given)
        for number in operation.writes:
            self.values[number] = result
        self.operations.append(operation)

    def _as_stock(self, number: int) -> None:
        """Gives a value the strides that it has in stock, wherever it is known by another number too."""
        format, value = self.formats[number], self.values[number]
        if format is None or not isinstance(value, Tensor):
            return
        same = tuple(i for i, other in enumerate(self.values) if other is value)
        if in_format(value, format) is value:
            # Of a size for which the formats are the same.
            for i in same:
                self.formats[i] = None
            return
        # In the graph of a frozen model as well, where a stand-in may have other strides than the tensor.
        always = freezing()
        self._do(Operation(lambda y: in_format(y, format, always), (number,), same))
        for i in same:
            self.formats[i] = None

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, step: FusedStep, number: int) -> None:
        try:
            self._fused(step, number)
        except Unservable as reason:
            if isinstance(reason, _NoBatch) and self.program.batches:
                raise
            # By what the step was made of, which does all that stock does.
            for read in step.reads:
                self._as_stock(read)
            self._do(Operation(self._plain(step, number, None), step.reads, (number,)))

    def _plain(self, step: FusedStep, number: int, format: torch.memory_format | None) -> Callable[..., Any]:
        """The step in stock's ops. `format`: which they are to give their result; None: as it comes."""
        formats = [self.formats[read] for read in step.reads]
        own = self.program.plain.get(number)
        run = plain_layers(step, self.parameters) if own is None else plain_calls(own, self.module)

        def in_stocks_format(*given: Tensor) -> Tensor:
            y = run(*(in_format(x, f) if isinstance(x, Tensor) else x for x, f in zip(given, formats, strict=True)))
            return in_format(y, format)

        return in_stocks_format

    def _fused(self, step: FusedStep, number: int) -> None:
        x = self.values[step.x]
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            raise Unservable("a convolution's input is no strided tensor")
        first = step.layers[0]
        if x.dim() != first.conv.dims + 2:
            raise _NoBatch(f"a convolution's input has {x.dim()} dimensions, not {first.conv.dims + 2}")
        weight = self.parameters[first.tensors[0]]
        if x.numel() == 0:
            raise Unservable("a convolution's input is empty")
        if x.shape[1] != first.conv.in_channels:
            raise Unservable("a convolution's input has another number of channels than its weight takes")
        source, pad, mode = step.x, list(first.pad), first.pad_mode
        if pad:
            source = self._derive(lambda x: F.pad(x, pad, mode), source)
            if mode == "circular" or x.dim() == 3:
                self.formats[source] = None  # which gives a contiguous result of any input
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype):
            if self.values[source].dtype != dtype:
                source = self._derive(lambda x: x.to(dtype), source)
        elif weight.dtype != x.dtype:
            raise Unservable(f"the input is {x.dtype} and the weight {weight.dtype}")
        # On other devices stock's own kernels compute what isn't on images, in its own format.
        view = step.view if x.device.type == "cpu" else View.SAME
        own_format = view is View.SAME and first.conv.dims != 2 and x.device.type != "cpu"
        if own_format:
            for read in (source, *step.reads[1:]):
                self._as_stock(read)
        x = self.values[source]
        format = result_format(step, x, self.formats[source], self.parameters)
        for own in step.layers:
            if own.promotes and self.parameters[own.tensors[2]].dtype != x.dtype:
                raise Unservable("a batch norm's parameters have another dtype, to which it casts its result")
        if weight.device != x.device:
            raise Unservable(f"the input is on {x.device} and the weight on {weight.device}")
        if self.step_readers[source] > 1 and not own_format:
            source = self._in_channels_last(source)
            x = self.values[source]
        reads = (source, *step.reads[1:])
        problem = self._problem(step, x)
        if any(own.promotes for own in step.layers) and math.prod(problem.output_shape()[2:]) == 1:
            raise Unservable("of one pixel, what a batch norm written out gives has strides that depend on how it is written")
        residual = self.values[step.residual] if len(reads) > 1 else None
        self._check_residual(step, problem, residual, format, number)
        folded = self.folded.step(step.layers, self.parameters, x.dtype, view)
        problem = viewed_problem(problem, view)
        bound = self._bind(problem, folded)
        self.made.note_kernel(number, problem, bound, folded)
        plain = plain_padded(step, self.parameters) if pad else self._plain(step, number, torch.channels_last)
        self._do(_operation(bound.kernel, residual is not None, reads, number, plain, view))
        self.formats[number] = format

    def _derive(self, make: Callable[[Tensor], Tensor], source: int) -> int:
        """Makes another value of one, which stays for its other readers; gives its number."""
        made = self._new_value()
        self.formats[made] = self.formats[source]
        self._do(Operation(make, (source,), (made,)))
        return made

    def _new_value(self) -> int:
        self.values.append(None)
        self.formats.append(None)
        return len(self.values) - 1

    def _in_channels_last(self, number: int) -> int:
        """The number of a value in channels_last, for all that read it so: itself, or one that is made of it."""
        if channels_are_last(self.values[number]):
            return number
        if number not in self.converted:
            made = self._derive(lambda x: in_format(x, torch.channels_last), number)
            self.formats[made] = self.formats[number] or torch.contiguous_format
            self.converted[number] = made
        return self.converted[number]

    def _bind(self, problem: Problem, parameters: ConvParameters) -> Bound:
        chosen = choice(self.settings.backend)
        try:
            return bind(problem, parameters, chosen)
        except BackendError as error:
            if all(conv.dims == 2 for conv in problem.convs):
                raise
            # Who chooses a backend chooses it for what it may have kernels for.
            raise Unservable(str(error)) from error

    def _problem(self, step: FusedStep, x: Tensor) -> Problem:
        layout = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        return Problem(step.steps, tuple(x.shape), Types.of(x.dtype), x.device, layout, self.settings.precision)

    def _check_residual(
        self, step: FusedStep, problem: Problem, residual: Any, format: torch.memory_format, number: int
    ) -> None:
        """Raises Unservable where stock's sum is more than one of equal tensors, or its format isn't the convolution's."""
        last, shapes = step.layers[-1], problem.shapes()
        if not last.epilogue.residual:
            return
        # Before the pool.
        added, sums = last.reads[1], last.step._replace(epilogue=last.epilogue._replace(pool=None))
        shape = sums.result_shape(shapes[last.reads[0]])
        if added >= FIRST_RESULT:
            if shapes[added] != shape:
                self.made.unequal.append(number)
                raise Unservable("the two paths of a block differ in shape")
            return
        # The identity shortcut of a block is its input as it was before a cast.
        own, given = (self.values[step.x], self.formats[step.x]) if added == X else (residual, self.formats[step.residual])
        if not isinstance(own, Tensor) or own.shape != shape:
            self.made.unequal.append(number)
            raise Unservable("a residual differs in shape from what it is added to")
        if own.dtype != problem.dtype or own.device != problem.device or own.layout is not torch.strided:
            raise Unservable("a residual differs in dtype, device or layout from what it is added to")
        given = given or format_of(own)
        if given != format and not same_in_both(own):
            raise Unservable("a residual has another memory format than what it is added to")

    # ---- passes ------------------------------------------------------------------------------------------------------

    def _pass(self, step: FusedStep, number: int) -> None:
        """A gate, or a batch norm by itself; as the calls that it was made of where no kernel of ours serves it."""
        given, formats = [self.values[read] for read in step.reads], [self.formats[read] for read in step.reads]
        settings = self.settings
        try:
            found = bind_pass(step, given, formats, self.parameters, self.folded, settings.precision, settings.backend)
        except Refused as refused:
            if refused.unequal:
                self.made.unequal.append(number)
            self._as_calls(step, number)
            return
        self.made.note_kernel(number, found.problem, found.bound, found.parameters)
        plain = self._plain(step, number, torch.channels_last)
        self._do(_operation(found.bound.kernel, step.residual != NONE, step.reads, number, plain))
        self.formats[number] = found.format

    def _as_calls(self, step: FusedStep, number: int) -> None:
        """A step as the calls that it was made of."""
        program = self.program.plain.get(number)
        if program is None:
            for read in step.reads:
                self._as_stock(read)
            self._do(Operation(self._plain(step, number, None), step.reads, (number,)))
            return
        numbers = dict(enumerate(step.reads))

        def renumbered(own: int) -> Value:
            return Value(numbers[own])

        for own, call in enumerate(program.items, program.inputs):
            assert isinstance(call, Call)
            numbers[own] = number if Value(own) == program.outputs else self._new_value()
            args, kwargs = fill(call.args, renumbered), fill(call.kwargs, renumbered)
            self._call(call._replace(args=args, kwargs=kwargs, reads=tuple(numbers[read] for read in call.reads)), numbers[own])

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _call(self, call: Call, number: int) -> None:
        if asks_for_sizes(call, self.shaped, self.made.constants):
            given = [self.values[read] for read in call.reads]
            self.values[number] = self.made.constants[number] = caller(call, self.module)(*given)
            return
        if self._fast_layer(call, number) or self._slice_of_all(call, number):  # which take the kernels' own format
            return
        format = self._common_format(call) if call.transparent else None
        reads = call.reads
        if format is None:
            for read in reads:
                self._as_stock(read)
        elif not call.writes:
            reads = tuple(self._in_channels_last(r) if self._is_image(r) else r for r in reads)
        if call.writes:
            self.converted.clear()  # views of what it writes to are values, too
        self._do(Operation(caller(call, self.module), reads, (number,)))
        value = self.values[number]
        if isinstance(value, Tensor) and 3 <= value.dim() <= 5:
            # What is written in place, or given back, stays as it was.
            same = next((read for read in reads if self.values[read] is value), None)
            self.formats[number] = format if same is None else self.formats[same]

    def _slice_of_all(self, call: Call, number: int) -> bool:
        """Takes all of a value by slices, as GhostNet does, in whatever format the value has; False for any other call.

        Only where nothing else reads the value: what is done in place to one would have to be done to the other.
        """
        if call.target is not operator.getitem or len(call.reads) != 1 or self.readers[call.reads[0]] != 1:
            return False
        (source,) = call.reads
        x = self.values[source]
        if self.formats[source] is None or not isinstance(x, Tensor) or call.args[0] != Value(source):
            return False
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        if not all(isinstance(part, slice) for part in index) or x[index].shape != x.shape:
            return False
        if sum(value is x for value in self.values) > 1:
            return False  # it is known by another number, too, as what is written in place is
        self._do(Operation(lambda x: x[index], call.reads, (number,)))
        self.formats[number] = self.formats[source]
        return True

    def _is_image(self, number: int) -> bool:
        """Whether a value has a memory format."""
        value = self.values[number]
        return isinstance(value, Tensor) and 3 <= value.dim() <= 5 and not same_in_both(value)

    def _common_format(self, call: Call) -> torch.memory_format | None:
        """The format of stock's result of a call that doesn't depend on its inputs' formats.

        None where it isn't known, and where all inputs are as in stock, so that there is nothing to gain.
        """
        images = [number for number in call.reads if self._is_image(number)]
        others = [self.values[number] for number in call.reads if number not in images]
        dims = {self.values[number].dim() for number in images}
        if len(dims) != 1 or (dims != {4} and not call.elementwise):
            return None
        formats = {self.formats[number] or format_of(self.values[number]) for number in images}
        if None in formats or all(self.formats[number] is None for number in images):
            return None
        if call.target in CONCATENATIONS:
            if others:
                return None
            return formats.pop() if len(formats) == 1 else torch.contiguous_format
        if self._norms_groups(call):
            # On other devices stock's result is contiguous whatever its input is.
            return formats.pop() if self.values[images[0]].device.type == "cpu" else None
        # One number has no format; with more dimensions than the images it gives them more, too.
        vectors = (v for v in others if isinstance(v, Tensor) and (v.numel() != 1 or v.dim() > max(dims)))
        if len(formats) > 1 or any(value.dim() not in dims for value in vectors):
            return None
        (format,) = formats
        # What a mean of channels_last gives is contiguous or not by its dimensions.
        return None if call.target == "mean" and format != torch.contiguous_format else format

    def _norms_groups(self, call: Call) -> bool:
        if call.kind == "call_module" and self.module is not None:
            return isinstance(self.module.get_submodule(call.target), nn.GroupNorm)
        return call.target is F.group_norm

    def _fast_layer(self, call: Call, number: int) -> bool:
        """Runs a layer that isn't fused with another by a kernel: a mean over all pixels, or the classifier.

        False where stock's is as good.
        """
        if not call.fast or self.module is None or len(call.reads) != 1 or self.settings.precision != "fast":
            return False
        layer = self.module.get_submodule(call.target) if call.kind == "call_module" else None
        x = self.values[call.reads[0]]
        if not isinstance(x, Tensor) or x.layout is not torch.strided or autocast_dtype(x.device.type) is not None:
            return False
        mean = mean_of(call, layer)
        if mean is not None:
            return self._mean(mean, x, call, number)
        if type(layer) is not nn.Linear:
            return False
        found = bind_linear(layer, x, self.formats[call.reads[0]] is None, self.folded, self.settings.backend)
        if found is None:
            return False
        self.made.note_kernel(number, found.problem, found.bound, found.parameters)
        self._do(Operation(found.run, call.reads, (number,)))
        return True

    def _mean(self, mean: Mean, x: Tensor, call: Call, number: int) -> bool:
        bound = bind_mean(x, self.settings.backend)
        if bound is None:
            return False
        (source,) = call.reads
        format = self.formats[source] or torch.channels_last
        pooled = number if mean.keeps else self._new_value()
        self._do(_operation(bound.kernel, False, (source,), pooled, lambda x: F.adaptive_avg_pool2d(x, 1)))
        self.formats[pooled] = format if mean.as_input else torch.contiguous_format
        if not mean.keeps:
            self._do(Operation(lambda y: y.flatten(1), (pooled,), (number,)))
        return True


def _operation(
    kernel: Kernel,
    has_residual: bool,
    reads: tuple[int, ...],
    number: int,
    plain: Callable[..., Any],
    view: View = View.SAME,
) -> Operation:
    """A kernel as an operation on numbered values."""
    joinable, kernel = kernel if isinstance(kernel, JoinableKernel) else None, in_view(kernel, view)
    return Operation(kernel if has_residual else without_residual(kernel), reads, (number,), joinable, plain, view)
