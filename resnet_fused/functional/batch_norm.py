"""Batch norm with what follows it, in training and in inference, for where it can't be folded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import ops
from resnet_fused.backends.batch_norm import beats_stock
from resnet_fused.ops.checks import check_dims, check_residual
from resnet_fused.ops.common import update_statistics
from resnet_fused.runtime.calls import plain, stock_only


def bn(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm.

        y = (x − mean) · weight / sqrt(var + eps) + bias

    Stock equivalent: F.batch_norm, with the same arguments.

    Args:
        x: (N, C, H, W), any floating-point dtype.
        running_mean, running_var: (C,). In training they move towards the batch's statistics, in place, or are None;
            otherwise they are what x is normalised with.
        weight, bias: (C,), of x's dtype or float32, or None for 1 and 0.
        training: whether x is normalised with the statistics of the batch.
        momentum: share of the batch in the new running statistics.
        eps: added to the variance.

    Returns:
        As x, in x's memory format.

    Raises:
        ValueError: a shape or device doesn't fit, the running statistics are missing, or in training there is but one value
            per channel.
        BackendError: a backend was chosen explicitly and can't serve.

    Source: Ioffe and Szegedy, Batch Normalization, 2015.
    """
    return _batch_norm(False, x, None, running_mean, running_var, weight, bias, training, momentum, eps)


def bn_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm and ReLU in one pass, of which backward keeps x and the result.

        y = relu((x − mean) · weight / sqrt(var + eps) + bias)

    Stock equivalent: F.relu(F.batch_norm(x, …)). Arguments, result and errors as `bn`.
    """
    return _batch_norm(True, x, None, running_mean, running_var, weight, bias, training, momentum, eps)


def bn_add_relu(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm, a residual added, and ReLU in one pass: the end of a residual block in training.

        y = relu((x − mean) · weight / sqrt(var + eps) + bias + residual)

    Stock equivalent: F.relu(F.batch_norm(x, …) + residual). Arguments, result and errors as `bn`, and

    Args:
        residual: of x's shape, dtype and device; it is not modified.
    """
    check_residual(x, residual)
    return _batch_norm(True, x, residual, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm(
    relu: bool,
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    check_dims("x", x, 4, "(N, C, H, W)")
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if vector is None:
            if not training and name.startswith("running"):
                raise ValueError(
                    f"{name} is None; with training=False it is what x is normalised with. Pass it, or training=True."
                )
        elif tuple(vector.shape) != (x.shape[1],) or vector.device != x.device:
            raise ValueError(
                f"{name} is {tuple(vector.shape)} on {vector.device}; it must be ({x.shape[1]},) on {x.device}, one for each "
                f"channel of x, whose shape is {tuple(x.shape)}."
            )
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, one value per channel, whose variance is not defined. Use a larger batch or image, "
            "or training=False."
        )
    if not _beats_stock(relu, x, residual, *vectors.values()):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        return F.relu(y, inplace=True) if relu else y
    statistics = (None, None) if training else (running_mean, running_var)
    rest = (weight, bias, *statistics, eps, "")
    if residual is not None:
        y, mean, _, unbiased = ops.bn_add_relu(x, residual, *rest)
    else:
        y, mean, _, unbiased = ops.bn_relu(x, *rest) if relu else ops.bn(x, *rest)
    if training:
        with torch.no_grad():
            update_statistics(running_mean, mean, momentum)
            update_statistics(running_var, unbiased, momentum)
    return y


def _beats_stock(relu: bool, x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> bool:
    """Whether the op serves these tensors, and on another backend than the reference: stock's own batch norm is faster."""
    if x.layout is not torch.strided or x.numel() == 0:
        return False
    if any(t is not None and t.dtype not in (x.dtype, torch.float32) for t in vectors):
        return False
    if stock_only() or not (torch.compiler.is_compiling() or plain(x, residual, *vectors)):
        return False
    return beats_stock(x, residual is not None, relu)
