"""Random tensors for a problem: inputs and parameters, the same everywhere for one seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.backends.parameters import ConvParameters
from resnet_fused.backends.problem import RESIDUAL, Affine, Conv, Linear, Problem, Shape


def activations(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Normal values of a shape, such as (N, C, H, W)."""
    values = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    return values.normal_(generator=torch.Generator(device).manual_seed(seed))


def inputs_of(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """x and, where the problem has one, the residual, in the problem's memory format."""
    kind = problem.types.source, problem.device
    x = activations(problem.shape, *kind, seed, problem.memory_format)
    if not problem.reads_residual:
        return x, None
    return x, activations(problem.shapes()[RESIDUAL], *kind, seed + 1, problem.memory_format)


def more_inputs_of(problem: Problem, seed: int = 8) -> tuple[Tensor, ...]:
    """Its inputs beyond x and the residual, if it has some."""
    kind = problem.types.source, problem.device
    return tuple(activations(shape, *kind, seed + i, problem.memory_format) for i, shape in enumerate(problem.more))


def parameters_of(problem: Problem, seed: int = 2) -> ConvParameters:
    """Weights that keep the size of values from layer to layer, and biases of their size."""
    generator = torch.Generator("cpu").manual_seed(seed)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for step in problem.steps:
        if isinstance(step.operation, Affine):
            for found in (weights, biases):
                values = torch.randn(sum(step.operation.channels), generator=generator, dtype=torch.float32, device="cpu")
                found.append(values.to(problem.device, problem.types.accumulation))
        conv = Conv(*step.operation, (1, 1)) if isinstance(step.operation, Linear) else step.operation
        if isinstance(conv, Conv):
            shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel
            weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") / math.prod(shape[1:]) ** 0.5
            weights.append(weight.to(problem.device, problem.types.weight))
            bias = torch.randn(conv.out_channels, generator=generator, dtype=torch.float32, device="cpu")
            biases.append(bias.to(problem.device, problem.types.weight))
    return ConvParameters(weights, biases)


def with_nan_and_inf(x: Tensor) -> Tensor:
    """A copy with a NaN in the middle and an Inf in the last corner."""
    x = x.clone()
    x[tuple(size // 2 for size in x.shape)] = math.nan
    x[(-1,) * x.dim()] = math.inf
    return x
