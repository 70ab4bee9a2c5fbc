"""The arithmetic of folding a batch norm in inference into the convolution before it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = 128 * 1024  # of a weight that are scaled together


def affine(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of y = (x − mean) · gamma / sqrt(var + eps) + beta, float64. All of shape (C,), or None for 1 and 0."""
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def scale_filters(weight: Tensor, scale: Tensor) -> Tensor:
    """weight · scale, rounded once to the weight's dtype. Weight (C, …), scale (C,) in float64.

    A few filters at a time: float64 copies of whole weights would be most of the memory that fusing takes.
    """
    filters = max(_VALUES // max(weight[:1].numel(), 1), 1)
    factors = scale.view(-1, *[1] * (weight.dim() - 1)).split(filters)
    parts = zip(weight.split(filters), factors, strict=True)
    return torch.cat([(part.double() * factor).to(weight.dtype) for part, factor in parts])


def is_finite(tensor: Tensor) -> bool:
    # isfinite().all() would make copies of the tensor's size.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())
