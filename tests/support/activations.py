"""The functions of epilogues as stock PyTorch computes them on a GPU, and tensors that try them."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import Activation, Epilogue
from resnet_fused.backends.activation import activated
from support.tolerances import assert_as_good_as_stock

FUNCTIONS = [*Activation]
SLOPE = 0.1
SPECIAL = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e4, -1e4, 100.0, -100.0, 3.0, -3.0, 6.0, -1e-3]
"""What a function must be tried on: the ends of its pieces, and where its parts over- or underflow, in float16 too."""


def epilogue_of(function: Activation, residual: bool = True) -> Epilogue:
    return Epilogue(residual, function, slope=SLOPE if function is Activation.LEAKY_RELU else 0.0)


def on_gpu(y: Tensor, epilogue: Epilogue) -> Tensor:
    """The function of y by the formula of stock's CUDA kernels. On CPUs GELU is another one, which may be NaN at infinity."""
    if epilogue.activation is not Activation.GELU:
        return activated(y, epilogue, inplace=False)
    wide = y if y.dtype == torch.float64 else y.float()
    return (wide * 0.5 * (1 + torch.erf(wide * 0.5**0.5))).to(y.dtype)


def special_operands(x: Tensor, bias: Tensor, residual: Tensor) -> None:
    """Makes the first of two images zeros, so that its sums are `SPECIAL` for every other channel, and others for the rest."""
    n, _, h, w = residual.shape
    assert n == 2
    x[0], bias[::2] = 0, 0
    values = torch.tensor(SPECIAL).repeat(-(-h * w // len(SPECIAL)))[: h * w].view(h, w)
    residual[0] = values.to(residual.dtype)


def check_function(y: Tensor, sums: Tensor, exact: Tensor, epilogue: Epilogue) -> None:
    """y is the function of the sums of `special_operands`: of stock's in its dtype, and of those in float64."""
    stock = on_gpu(sums, epilogue)
    torch.testing.assert_close(y[0, ::2], stock[0, ::2], equal_nan=True)
    assert torch.equal(y[0].isnan(), stock[0].isnan())
    assert torch.equal(y[0].isinf(), stock[0].isinf())
    assert_as_good_as_stock(y[1], stock[1], on_gpu(exact, epilogue)[1])
