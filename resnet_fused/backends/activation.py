"""The functions at the end of an epilogue, as stock PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends.problem import Activation, Epilogue

_FUNCTIONS: dict[Activation, Callable[[Tensor, bool], Tensor]] = {
    Activation.RELU: lambda y, inplace: y.relu_() if inplace else y.relu(),
    Activation.RELU6: F.relu6,
    Activation.SIGMOID: lambda y, inplace: y.sigmoid_() if inplace else y.sigmoid(),
    Activation.SILU: F.silu,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.HARDSWISH: F.hardswish,
    Activation.GELU: lambda y, inplace: F.gelu(y),
    Activation.GELU_TANH: lambda y, inplace: F.gelu(y, approximate="tanh"),
}


def activated(y: Tensor, epilogue: Epilogue, inplace: bool) -> Tensor:
    """The epilogue's function of y; `inplace`: y may be overwritten."""
    if epilogue.activation is Activation.NONE:
        return y
    if epilogue.activation is Activation.LEAKY_RELU:
        return F.leaky_relu(y, epilogue.slope, inplace)
    return _FUNCTIONS[epilogue.activation](y, inplace)
