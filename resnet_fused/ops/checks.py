"""Checks of what a user passes: each error names the argument, the value, the rule and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from resnet_fused.backends import Conv, Problem
from resnet_fused.backends.problem import FIRST_RESULT, X


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor, or what stands for one while fx traces."""
    if not isinstance(value, (Tensor, fx.Proxy)):
        raise TypeError(
            f"{name} is {type(value).__name__}; it must be a torch.Tensor. Make one of it with torch.as_tensor, and of a list "
            "of images with torch.stack."
        )


def check_dims(name: str, tensor: Tensor, dims: int, layout: str) -> None:
    """Raises ValueError unless `tensor` has `dims` dimensions."""
    if tensor.dim() != dims:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must have {dims} dimensions, {layout}. "
            f"{'Add a batch dimension with unsqueeze(0).' if tensor.dim() == dims - 1 else 'Reshape it.'}"
        )


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raises ValueError unless `residual` is as x in shape, dtype and device."""
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}; it must be as x, {tuple(x.shape)} "
            f"{x.dtype} on {x.device}. Expand, cast or move it before."
        )


def check(problem: Problem, x: Tensor, residual: Tensor | None, weights: Sequence[Tensor]) -> None:
    """Raises ValueError where an input doesn't fit the problem's parameters, before any backend sees it."""
    # Of a block the main path's convolution before the shortcut's, as its arguments are listed.
    for step, weight in reversed([*zip(problem.steps, weights, strict=False)]):
        conv = step.operation
        if isinstance(conv, Conv) and step.reads[0] == X and x.shape[1] != conv.in_channels:
            raise ValueError(
                f"x has {x.shape[1]} channels (shape {tuple(x.shape)}); the weight of shape {tuple(weight.shape)} with "
                f"groups={conv.groups} takes {conv.in_channels}. Pass an input with {conv.in_channels} channels, "
                "dimension 1 in (N, C, H, W)."
            )
    for weight in weights:
        if weight.dtype != x.dtype:
            # A module can't be cast to an integer type, and autocast leaves integers alone.
            remedy = f"Cast one of them (x.to({weight.dtype}) or module.to({x.dtype})), or use torch.autocast."
            raise ValueError(
                f"x has dtype {x.dtype} and the weight {weight.dtype}; they must be the same. "
                f"{remedy if x.is_floating_point() else f'Cast the input: x.to({weight.dtype}).'}"
            )
        if weight.device != x.device:
            raise ValueError(f"x is on {x.device} and the weight on {weight.device}; move one with .to({str(x.device)!r}).")
    shape = problem.output_shape()
    if shape[2] < 0 or shape[3] < 0 or (0 in shape[2:] and 0 not in x.shape):
        raise ValueError(
            f"x has {x.shape[2]}×{x.shape[3]} pixels, and the result would have {max(shape[2], 0)}×{max(shape[3], 0)}; "
            "every convolution and pool needs an input at least as large as its window. Pass a larger image."
        )
    shapes = problem.shapes()
    for number, step in enumerate(problem.steps, FIRST_RESULT):
        if step.epilogue.residual and step.reads[1] >= FIRST_RESULT and shapes[step.reads[1]] != shapes[number]:
            raise ValueError(
                f"the shortcut's result has shape {shapes[step.reads[1]]} and that of the main path {shapes[number]}; they are "
                "added, and must be the same. Choose strides and paddings so that both paths keep as many pixels."
            )
    if residual is not None:
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; it must have the result's shape {shape}. "
                "Where sizes differ, project the shortcut with conv2d_bn first."
            )
        if residual.dtype != x.dtype or residual.device != x.device:
            raise ValueError(
                f"residual is {residual.dtype} on {residual.device} and x {x.dtype} on {x.device}; they must be the same. "
                "Cast or move one of them with .to()."
            )
