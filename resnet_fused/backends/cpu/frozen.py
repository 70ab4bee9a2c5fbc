"""The kernels of csrc/cpu as operators of tensors (csrc/cpu/frozen.cpp), which a process without Python runs, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Epilogue
from resnet_fused.backends.freezing import channels_last_result, output_size

_NO_PLAN = [0]  # the direct sum; AOTInductor loses the type of an empty list


class FrozenSteps:
    """The steps of a `Chain`, each computed at once; values are the tensors themselves."""

    def __init__(self) -> None:
        self._library = torch.ops.resnet_fused_cpu

    def conv(
        self,
        x: Tensor,
        residual: Tensor | None,
        weights: Tensor,
        bias: Tensor,
        out_channels: int,
        groups: int,
        geometry: list[int],
        epilogue: Epilogue,
        parameters: ConvParameters,
        plan: list[int],
    ) -> Tensor:
        plain, isa = plain_weight(parameters) if plan else None, packed_for(parameters)
        function = epilogue.activation.value, epilogue.slope
        return self._library.frozen_conv(
            x, residual, weights, bias, plain, out_channels, groups, geometry, *function, plan or _NO_PLAN, isa
        )

    def block(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        channels: list[int],
        parameters: Sequence[ConvParameters],
        plan: list[int],
    ) -> Tensor:
        plain, isa = [*map(plain_weight, parameters)], packed_for(parameters[0])
        return self._library.frozen_block(x, weights, biases, plain, channels, plan, isa)

    def one_pass(
        self,
        sources: list[Tensor],
        gate: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        return self._library.frozen_pass(sources, gate, residual, scale, shift, epilogue.activation.value, epilogue.slope)

    def average_pool(self, x: Tensor) -> Tensor:
        return self._library.frozen_average_pool(x)

    def stem(
        self,
        x: Tensor,
        weights: Tensor,
        bias: Tensor,
        out_channels: int,
        epilogue: Epilogue,
        parameters: ConvParameters,
    ) -> Tensor:
        """y = act(conv2d(x, weights) + bias), and the stem's max-pool where the epilogue has it; x has any strides."""
        function = epilogue.activation.value, epilogue.slope
        how = out_channels, epilogue.pool is not None, *function, packed_for(parameters)
        return self._library.frozen_stem(x, weights, bias, plain_weight(parameters), *how)


def packed_for(parameters: ConvParameters) -> int:
    """The instruction set that weights were packed for, asked once: the question isn't one of the graph's."""
    return parameters.pack(("cpu", "isa"), torch.ops.resnet_fused_cpu.isa)


def plain_weight(parameters: ConvParameters) -> Tensor:
    """The folded weight of one convolution as stock takes it, for values that a kernel declines."""

    def make() -> Tensor:
        (weight,), _ = parameters.tensors()
        return weight.detach().contiguous(memory_format=torch.channels_last)

    return parameters.pack(("cpu", "plain"), make)


# ---- shapes of results --------------------------------------------------------------------------------------------------


def _conv(
    x: Tensor,
    residual: Tensor | None,
    weights: Tensor,
    bias: Tensor,
    plain: Tensor | None,
    out_channels: int,
    groups: int,
    geometry: list[int],
    activation: str,
    slope: float,
    plan: list[int],
    isa: int,
) -> Tensor:
    return channels_last_result(x, out_channels, *output_size(x, geometry))


def _block(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    plain: list[Tensor],
    channels: list[int],
    plan: list[int],
    isa: int,
) -> Tensor:
    return channels_last_result(x, channels[-1], x.shape[2], x.shape[3])


def _stem(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    plain: Tensor,
    out_channels: int,
    pool: bool,
    activation: str,
    slope: float,
    isa: int,
) -> Tensor:
    size = [(x.shape[2 + d] - 1) // 2 + 1 for d in (0, 1)]
    return channels_last_result(x, out_channels, *([(s - 1) // 2 + 1 for s in size] if pool else size))


def _pass(
    sources: list[Tensor],
    gate: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor:
    return channels_last_result(sources[0], sum(x.shape[1] for x in sources), *sources[0].shape[2:])


def _average_pool(x: Tensor) -> Tensor:
    return channels_last_result(x, x.shape[1], 1, 1)


FAKES: dict[str, Callable[..., Tensor]] = {
    "frozen_conv": _conv,
    "frozen_block": _block,
    "frozen_stem": _stem,
    "frozen_pass": _pass,
    "frozen_average_pool": _average_pool,
}
