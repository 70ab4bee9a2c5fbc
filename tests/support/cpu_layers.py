"""One layer or block on the compiled operators, and the same in stock PyTorch at any dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import NO_PARAMETERS, Activation, Epilogue
from resnet_fused.backends.cpu.chain import Chain
from resnet_fused.backends.cpu.packing import padded_bias

CHANNELS_LAST = torch.channels_last


def run(chain: Chain, result: int, *inputs: Tensor) -> Tensor | None:
    """The value of a chain that has no results yet; None where a step declined its input."""
    chain.end([result])
    found = torch.ops.resnet_fused_cpu.run_chain(chain.id, [*inputs])
    return found[0] if found else None


@dataclass
class Layer:
    """relu(conv2d(x, weight) + bias + residual), on random tensors."""

    n: int
    c: int
    h: int
    w: int
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    residual: bool = True
    relu: bool = True
    dtype: torch.dtype = torch.float32
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = torch.randn(self.n, self.c, self.h, self.w).to(self.dtype).contiguous(memory_format=CHANNELS_LAST)
        inside = self.c // self.groups
        scale = (inside * self.kernel**2) ** -0.5
        self.weight = (torch.randn(self.out, inside, self.kernel, self.kernel) * scale).to(self.dtype)
        self.bias = torch.randn(self.out).to(self.dtype)
        shape = F.conv2d(self.x.float(), self.weight.float(), None, *self._geometry).shape
        self.added = torch.randn(shape).to(self.dtype).contiguous(memory_format=CHANNELS_LAST) if self.residual else None

    @property
    def _geometry(self) -> tuple[int, int, int, int]:
        return self.stride, self.padding, self.dilation, self.groups

    def stock(self, dtype: torch.dtype) -> Tensor:
        y = F.conv2d(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), *self._geometry)
        y = y if self.added is None else y + self.added.to(dtype)
        return y.relu() if self.relu else y

    def ours(self, plan: list[int]) -> Tensor | None:
        """By the compiled operator; `plan` as it takes it, empty for direct arithmetic."""
        ops = torch.ops.resnet_fused_cpu
        weight = self.weight.contiguous(memory_format=CHANNELS_LAST)
        packed = ops.pack(weight, bool(plan)) if self.groups == 1 else ops.pack_grouped(weight, self.groups)
        geometry = [v for v in (self.kernel, self.stride, self.padding, self.dilation) for _ in range(2)]
        inputs = [self.x] if self.added is None else [self.x, self.added]
        chain = Chain([tuple(t.shape) for t in inputs], self.dtype)
        residual = None if self.added is None else 1
        bias = padded_bias(self.bias)
        epilogue = Epilogue(activation=Activation.RELU if self.relu else Activation.NONE)
        result = chain.conv(0, residual, packed, bias, self.out, self.groups, geometry, epilogue, NO_PARAMETERS, plan)
        return run(chain, result, *inputs)


@dataclass
class Block:
    """A residual block of stride 1: basic (two 3×3) or bottleneck (1×1, 3×3, 1×1), with identity or projection shortcut."""

    n: int
    c: int
    h: int
    w: int
    width: int
    out: int
    basic: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        kernels = (3, 3) if self.basic else (1, 3, 1)
        self.channels = [self.c, *[self.width] * (len(kernels) - 1), self.out]
        sizes = [*zip(self.channels[1:], self.channels[:-1], kernels, strict=True)]
        if self.c != self.out:
            sizes.append((self.out, self.c, 1))
        self.x = torch.randn(self.n, self.c, self.h, self.w).to(self.dtype).contiguous(memory_format=CHANNELS_LAST)
        self.weights = [(torch.randn(o, i, k, k) * (i * k * k) ** -0.5).to(self.dtype) for o, i, k in sizes]
        self.biases = [torch.randn(o).to(self.dtype) for o, _, _ in sizes]

    def stock(self, dtype: torch.dtype) -> Tensor:
        weights, biases = [w.to(dtype) for w in self.weights], [s.to(dtype) for s in self.biases]
        x = y = self.x.to(dtype)
        if self.c != self.out:
            x = F.conv2d(x, weights.pop(), biases.pop())
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = F.conv2d(y, weight, bias, padding=weight.shape[2] // 2)
            y = (y + x).relu() if i == len(weights) - 1 else y.relu()
        return y

    def ours(self, plan: list[int]) -> Tensor | None:
        """By the compiled operator; `plan`: strip, parts, panels."""
        ops = torch.ops.resnet_fused_cpu
        weights = [w.contiguous(memory_format=CHANNELS_LAST) for w in self.weights]
        packed = [ops.pack(w, w.shape[2] == 3) for w in weights]
        biases = [padded_bias(s) for s in self.biases]
        chain = Chain([tuple(self.x.shape)], self.dtype)
        return run(chain, chain.block(0, packed, biases, self.channels[1:], [], plan), self.x)
