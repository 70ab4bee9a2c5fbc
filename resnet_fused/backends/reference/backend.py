"""Stock PyTorch, op by op: the truth that other backends are compared with, and the fall-back that serves everything."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import Backend, ConvParameters, Implementation, Kernel
from resnet_fused.backends.activation import activated
from resnet_fused.backends.functions import CONVOLUTIONS, POOLS
from resnet_fused.backends.implementation import in_turn
from resnet_fused.backends.problem import Activation, Affine, Conv, Kind, Linear, Pointwise, Problem, Step
from resnet_fused.backends.reference.batch_norm import BatchNorm
from resnet_fused.backends.training_conv import STOCKS, TrainingConvKernels


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """conv2d(x, weight) + bias, or the same in one or three dimensions."""
    if conv.fails_in_channels_last(x.shape[-1]):
        x, weight = x.contiguous(), weight.contiguous()
    return CONVOLUTIONS[conv.dims](x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class StockOps(Implementation):
    """Steps one after the other, each by PyTorch's own functions.

    Args:
        conv2d: the function of x, weight, bias and geometry that convolutions are computed by.
    """

    name = "stock ops"
    kinds = frozenset(
        {
            *(Kind.CONVOLUTION, Kind.CONVOLUTION_ND, Kind.LINEAR, Kind.AFFINE),
            *(Kind.ELEMENTWISE, Kind.AVERAGE_POOL, Kind.PROGRAM),
        }
    )

    def __init__(self, conv2d: Callable[[Tensor, Tensor, Tensor | None, Conv], Tensor] = conv2d) -> None:
        self._conv2d = conv2d

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        weights, biases = parameters.unpacked()
        given = iter(zip(weights, biases, strict=True))
        with_weights = (Conv, Linear, Affine)
        runs = [self._step(step, *(next(given) if isinstance(step.operation, with_weights) else ())) for step in problem.steps]
        return runs[0] if len(runs) == 1 else in_turn(runs, [step.reads for step in problem.steps])

    def _step(self, step: Step, weight: Tensor | None = None, bias: Tensor | None = None) -> Kernel:
        operation, epilogue = step.operation, step.epilogue
        sums = self._sums(operation, weight, bias if epilogue.bias else None)
        if operation is Pointwise.RELU_GRADIENT:
            return lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0)
        adds, pool, gated = epilogue.residual, epilogue.pool, epilogue.gate
        # The sums are a new tensor, unless there was nothing to sum up.
        in_place = operation is not Pointwise.IDENTITY

        def kernel(x: Tensor, residual: Tensor | None, *more: Tensor) -> Tensor:
            y, fresh = sums(x, *(more[:-1] if gated else more)), in_place
            if gated:
                y, fresh = y * more[-1], True
            if adds:
                assert residual is not None
                y, fresh = y.add_(residual) if fresh else y.add(residual), True
            y = activated(y, epilogue, fresh)
            return y if pool is None else POOLS[len(pool.kernel)](y, *pool)

        return kernel

    def _sums(self, operation: object, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        """The operation without its epilogue, but with its bias."""
        if isinstance(operation, Conv):
            conv2d = self._conv2d
            assert weight is not None
            return lambda x: conv2d(x, weight, bias, operation)
        if isinstance(operation, Linear):
            assert weight is not None
            matrix = weight.flatten(1)
            return lambda x: F.linear(x.flatten(1), matrix, bias)
        if isinstance(operation, Affine):
            assert weight is not None
            assert bias is not None
            scale, shift = weight[:, None, None], bias[:, None, None]
            return lambda *x: ((x[0] if len(x) == 1 else torch.cat(x, 1)) * scale + shift).to(x[0].dtype)
        if operation is Pointwise.AVERAGE_POOL:
            return lambda x: F.adaptive_avg_pool2d(x, 1)
        return lambda x: x


class StockTrainingConv(Implementation):
    """PyTorch's own products."""

    name = "stock training"
    kinds = frozenset({Kind.TRAINING_CONV})

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> TrainingConvKernels:
        return STOCKS


class Reference(Backend):
    """Stock PyTorch ops on folded weights."""

    name = "reference"
    freezes = True
    activations = tuple(Activation)
    implementations = (StockOps(), StockTrainingConv(), BatchNorm())

    def unavailable(self) -> str | None:
        return None

    def why_none(self, problem: Problem) -> str | None:
        return None

    def preferred(self, problem: Problem) -> bool:
        return True
