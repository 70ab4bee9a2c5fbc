"""The end of a ResNet: the average over an image's pixels, and the classifier."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.backends import ConvParameters, Implementation, Kernel
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.convolution import Direct
from resnet_fused.backends.problem import Conv, Epilogue, Kind, Linear, Problem

# Stock reads the weights of few rows on one thread. Ours took 0.33 to 0.91 of its time up to here (512 and 2048 features, 1000
# classes, two cores of a Zen 5); with 256 rows the two are level in bfloat16.
_MOST_ROWS = 128
# The packed copy of a larger layer (VGG's have 100 million weights) takes more memory than its speed is worth.
_MOST_WEIGHTS = 1 << 22


class AveragePool(Implementation):
    """The mean of each channel, of channels_last images; csrc/cpu/average_pool.h.

    At batch 1 stock sums 2048 channels on one thread, half of them out of the other core's cache: in a ResNet-50 115 µs, ours
    36 (two cores of a Zen 5).
    """

    name = "average pool"
    kinds = frozenset({Kind.AVERAGE_POOL})

    def why_not(self, problem: Problem) -> str | None:
        _, channels, height, width = problem.shape
        return "of one channel or pixel stock's is as quick" if channels == 1 or height * width == 1 else None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        def record(chain: Chain, x: int, residual: int | None) -> int:
            return chain.average_pool(x)

        return ChainKernel(problem, record)


class Classifier(Implementation):
    """A linear layer on few rows, as a 1×1 convolution on images of one pixel."""

    name = "classifier"
    kinds = frozenset({Kind.LINEAR})

    def why_not(self, problem: Problem) -> str | None:
        linear = problem.steps[0].operation
        assert isinstance(linear, Linear)
        if problem.epilogue != Epilogue():
            return "it serves linear layers with a bias and nothing after it"
        if problem.shape[0] > _MOST_ROWS or linear.in_features * linear.out_features > _MOST_WEIGHTS:
            return f"it serves up to {_MOST_ROWS} rows and {_MOST_WEIGHTS} weights; for more stock's is as fast"
        return _DIRECT.why_not(_as_convolution(problem))

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        kernel = _DIRECT.prepare(_as_convolution(problem), parameters, None)

        def classify(x: Tensor, residual: Tensor | None) -> Tensor:
            return kernel(x.flatten(1)[:, :, None, None], None).flatten(1)

        return classify


_DIRECT = Direct()


def _as_convolution(problem: Problem) -> Problem:
    linear = problem.steps[0].operation
    assert isinstance(linear, Linear)
    return Problem.of(Conv(*linear, (1, 1)), problem.shape, problem.types.source, problem.device)
