"""Kernels of csrc/cpu: steps prepared natively for inputs of one shape and run by one call, be it one step or a stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import Declined, Epilogue, JoinableKernel
from resnet_fused.backends.problem import Shape


class Chain:
    """What csrc/cpu/chain.cpp runs by one call.

    Values are numbered: 0 is x, 1 the residual, and each step gives the next.

    Args:
        shape: of x, (N, C, H, W).
        dtype: of all activations, float32 or bfloat16.
    """

    X, RESIDUAL = 0, 1

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._library = torch.ops.resnet_fused_cpu
        self.id = self._library.new_chain(shape, dtype == torch.bfloat16)
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
        plan: list[int],
    ) -> int:
        """Adds y = act(conv2d(x, weights) + bias + residual).

        Args:
            x, residual: values.
            weights, bias: packed weights and padded bias.
            groups: of the convolution. The weights of more than one are packed by `pack_grouped`.
            geometry: kernel, stride, padding and dilation, two each.
            epilogue: its function is applied.
            plan: a WinogradPlan's numbers, or empty for the direct sum.
        """
        function = epilogue.activation.value, epilogue.slope
        return self._library.chain_conv(self.id, x, residual, weights, bias, out_channels, groups, geometry, *function, plan)

    def block(self, x: int, weights: list[Tensor], biases: list[Tensor], channels: list[int], plan: list[int]) -> int:
        """Adds y = relu(layers(x) + shortcut(x)), a residual block as a whole.

        Args:
            x: a value.
            weights, biases: packed weights and padded biases of the layers, and of a projection shortcut.
            channels: of each layer's result.
            plan: a BlockPlan's numbers.
        """
        return self._library.chain_block(self.id, x, weights, biases, channels, plan)


Record = Callable[[Chain, int, "int | None"], int]
"""record(chain, x, residual) adds the steps of a kernel to a chain and gives the number of the result."""


class ChainKernel(JoinableKernel):
    """A kernel that runs a chain. The chain is made at the first call, since parts of a longer one are never called.

    Args:
        shape: of x, (N, C, H, W).
        dtype: of x.
        record: adds the kernel's steps to a chain.

    Raises:
        Declined: x, or a result in between, holds values that Winograd can't be trusted with (csrc/cpu/uneven.h).
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, record: Record) -> None:
        self.shape, self.dtype, self.record = shape, dtype, record
        self.chain: Chain | None = None
        self._run = torch.ops.resnet_fused_cpu.run_chain.default

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        chain = self.chain
        if chain is None:
            chain = Chain(self.shape, self.dtype)
            self.record(chain, Chain.X, Chain.RESIDUAL)
            self.chain = chain
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        y = self._run(chain.id, x, residual)
        if y is None:
            raise Declined
        return y

    @classmethod
    def join(cls, kernels: Sequence[Any], reads: Sequence[tuple[int, ...]]) -> ChainKernel:
        def record(chain: Chain, x: int, residual: int | None) -> int:
            values = [x, residual]
            for kernel, (source, *added) in zip(kernels, reads, strict=True):
                values.append(kernel.record(chain, values[source], values[added[0]] if added else None))
            found = values[-1]
            assert found is not None
            return found

        return cls(kernels[0].shape, kernels[0].dtype, record)
