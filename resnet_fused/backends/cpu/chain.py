"""Kernels of csrc/cpu: steps prepared natively for inputs of given shapes and run by one call, be it one step or a network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Declined, Epilogue, JoinableKernel, Problem
from resnet_fused.backends.cpu.frozen import FrozenSteps
from resnet_fused.backends.freezing import freezing
from resnet_fused.backends.problem import FIRST_RESULT, RESIDUAL, Shape


class Chain:
    """What csrc/cpu/chain.cpp runs by one call.

    Values are numbered: first the inputs, and each step gives the next.

    Args:
        shapes: of the inputs, (N, C, H, W).
        dtype: of all activations, float32, bfloat16 or float16.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self._library = torch.ops.resnet_fused_cpu
        self.id = self._library.new_chain([size for shape in shapes for size in shape], dtype)
        # Not through the dispatcher: a chain may be collected while a mode watches or traces another model's operators.
        delete, keys = self._library.delete_chain.default.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        # Not at the interpreter's exit, where the operator may be gone already.
        weakref.finalize(self, delete, keys, self.id).atexit = False

    def conv(
        self,
        x: int,
        residual: int | None,
        weights: Tensor,
        bias: Tensor,
        out_channels: int,
        groups: int,
        geometry: list[int],
        epilogue: Epilogue,
        parameters: ConvParameters,
        plan: list[int],
    ) -> int:
        """Adds y = act(conv2d(x, weights) + bias + residual).

        Args:
            x, residual: values.
            weights, bias: packed weights and padded bias.
            groups: of the convolution. The weights of more than one are packed by `pack_grouped`.
            geometry: kernel, stride, padding and dilation, two each.
            epilogue: its function is applied.
            parameters: what weights and bias were packed of, which a frozen form needs.
            plan: a WinogradPlan's numbers, or empty for the direct sum.
        """
        function = epilogue.activation.value, epilogue.slope
        return self._library.chain_conv(self.id, x, residual, weights, bias, out_channels, groups, geometry, *function, plan)

    def block(
        self,
        x: int,
        weights: list[Tensor],
        biases: list[Tensor],
        channels: list[int],
        parameters: Sequence[ConvParameters],
        plan: list[int],
    ) -> int:
        """Adds y = relu(layers(x) + shortcut(x)), a residual block as a whole.

        Args:
            x: a value.
            weights, biases: packed weights and padded biases of the layers, and of a projection shortcut.
            channels: of each layer's result.
            parameters: what weights and biases were packed of, which a frozen form needs.
            plan: a BlockPlan's numbers.
        """
        return self._library.chain_block(self.id, x, weights, biases, channels, plan)

    def one_pass(
        self,
        sources: list[int],
        gate: int | None,
        residual: int | None,
        scale: Tensor | None,
        shift: Tensor | None,
        epilogue: Epilogue,
    ) -> int:
        """Adds y = act((x · scale + shift) · gate + residual).

        Args:
            sources: values whose concatenation along channels x is.
            gate: a value of one pixel.
            residual: a value.
            scale, shift: float32, of shape (C,).
            epilogue: its function is applied.
        """
        function = epilogue.activation.value, epilogue.slope
        return self._library.chain_pass(self.id, sources, gate, residual, scale, shift, *function)

    def average_pool(self, x: int) -> int:
        """Adds the mean of x over its pixels, of shape (N, C, 1, 1)."""
        return self._library.chain_average_pool(self.id, x)

    def end(self, results: Sequence[int]) -> None:
        """Says which values a run gives."""
        self._library.end_chain(self.id, [*results])


class ChainRun:
    """A function that runs a chain. The chain is made at the first call, since parts of a longer one are never called.

    Args:
        shapes: of the inputs.
        dtype: of all activations.
        record: record(chain, *inputs) adds the steps and gives the numbers of the results. Frozen, it is given `FrozenSteps`
            and tensors, and gives tensors.

    Raises:
        Declined: an input, or a result in between, holds values that Winograd can't be trusted with (csrc/cpu/uneven.h).
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, record: Callable[..., Sequence[Any]]) -> None:
        self.shapes, self.dtype, self.record = shapes, dtype, record
        self.chain: Chain | None = None
        self._run = torch.ops.resnet_fused_cpu.run_chain.default

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if freezing():
            return self.record(FrozenSteps(), *(x.contiguous(memory_format=torch.channels_last) for x in inputs))
        chain = self.chain
        if chain is None:
            chain = Chain(self.shapes, self.dtype)
            chain.end(self.record(chain, *range(len(self.shapes))))
            self.chain = chain
        results = self._run(chain.id, [x.contiguous(memory_format=torch.channels_last) for x in inputs])
        if not results:
            raise Declined
        return results


Record = Callable[..., int]
"""record(chain, x, residual, *more) adds the steps of a kernel to a chain and gives the number of the result."""


class ChainKernel(JoinableKernel):
    """A kernel that runs a chain.

    Args:
        problem: what it computes.
        record: adds its steps to a chain.

    Raises:
        Declined: as a `ChainRun`.
    """

    def __init__(self, problem: Problem, record: Record) -> None:
        self._set(problem.shapes()[: FIRST_RESULT + len(problem.more)], problem.reads_residual, problem.types.source, record)

    def _set(self, shapes: Sequence[Shape], has_residual: bool, dtype: torch.dtype, record: Record) -> None:
        self.dtype, self.record, self.has_residual = dtype, record, has_residual
        self.shapes = [shape for i, shape in enumerate(shapes) if i != RESIDUAL or has_residual]
        # Not by way of `self`: in a cycle, what the record holds would outlive its model until a garbage collection.
        self.run = ChainRun(self.shapes, dtype, lambda chain, *inputs: [_record(record, has_residual, chain, inputs)])

    def add_to(self, chain: Chain, inputs: Sequence[int]) -> int:
        """Adds its steps to a chain: `inputs` are those that it has. Gives the number of its result."""
        return _record(self.record, self.has_residual, chain, inputs)

    def __call__(self, x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
        given = (x, *more) if residual is None else (x, residual, *more)
        return self.run(*given)[0]

    def joins(self, other: Any) -> bool:
        return isinstance(other, ChainKernel) and other.dtype == self.dtype

    @classmethod
    def join(cls, kernels: Sequence[Any], reads: Sequence[tuple[int, ...]]) -> ChainKernel:
        def record(chain: Chain, x: int, residual: int | None) -> int:
            return _add(chain, kernels, reads, [x, residual])[-1]

        shapes = _input_shapes(kernels, reads, FIRST_RESULT)
        joined = cls.__new__(cls)
        joined._set(shapes, any(RESIDUAL in own for own in reads), kernels[0].dtype, record)
        return joined

    @classmethod
    def run_of(
        cls, kernels: Sequence[Any], reads: Sequence[tuple[int, ...]], inputs: int, results: Sequence[int]
    ) -> Callable[..., Sequence[Tensor]]:
        def record(chain: Chain, *given: int) -> list[int]:
            values = _add(chain, kernels, reads, [*given])
            return [values[number] for number in results]

        return ChainRun(_input_shapes(kernels, reads, inputs), kernels[0].dtype, record)


def _record(record: Record, has_residual: bool, chain: Chain, inputs: Sequence[int]) -> int:
    x, *others = inputs
    return record(chain, x, *others) if has_residual else record(chain, x, None, *others)


def _add(chain: Chain, kernels: Sequence[ChainKernel], reads: Sequence[tuple[int, ...]], values: list[Any]) -> list[int]:
    """Adds kernels on numbered values to a chain, and their results to the values."""
    for kernel, own in zip(kernels, reads, strict=True):
        values.append(kernel.add_to(chain, [values[number] for number in own]))
    return values


def _input_shapes(kernels: Sequence[ChainKernel], reads: Sequence[tuple[int, ...]], inputs: int) -> list[Shape]:
    """Shapes of the inputs of kernels on numbered values, as the kernels that read them have them."""
    found = {n: shape for kernel, own in zip(kernels, reads, strict=True) for n, shape in zip(own, kernel.shapes, strict=True)}
    return [found.get(number, (1, 1, 1, 1)) for number in range(inputs)]
