"""Convolutions with a batch norm folded in, and the whole ops that are made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.backends import Conv
from resnet_fused.ops.checks import check_dims, check_residual
from resnet_fused.runtime.folding import affine, scale_filters

IntOrPair = int | Sequence[int]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def fold_bn(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Folds a batch norm in inference into the convolution before it, in float64, rounded once.

        weight' = weight · scale,  bias' = (bias − running_mean) · scale + beta,  scale = gamma / sqrt(running_var + eps)

    Stock equivalent: torch.nn.utils.fusion.fuse_conv_bn_weights.

    Args:
        weight: (out_channels, in_channels / groups, kh, kw).
        bias: (out_channels,) or None for 0.
        running_mean, running_var: (out_channels,).
        gamma, beta: (out_channels,), or None for 1 and 0.
        eps: added to the variance.

    Returns:
        weight' and bias', (out_channels,), in the weight's dtype.

    Raises:
        ValueError: the weight hasn't four dimensions, or a vector not out_channels elements.
    """
    check_dims("weight", weight, 4, "(out_channels, in_channels / groups, kh, kw)")
    vectors = {"bias": bias, "running_mean": running_mean, "running_var": running_var, "gamma": gamma, "beta": beta}
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; it must be ({weight.shape[0]},), one for each output channel of the "
                f"weight of shape {tuple(weight.shape)}."
            )
    scale, offset = affine(running_mean, running_var, gamma, beta, eps)
    if bias is not None:
        offset = offset + bias.double() * scale
    return scale_filters(weight, scale), offset.to(weight.dtype)


def _renamed(**names: str) -> Callable[[_Function], _Function]:
    """Lets a function be called with the old names of arguments, `new="old"`, too."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for new, old in names.items():
                if old in kwargs:
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@_renamed(bias="shift")
def conv2d_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with a batch norm folded in.

        y = conv2d(x, weight) + bias

    Stock equivalent: bn(F.conv2d(x, …)) in inference, or F.conv2d(x, weight, bias, stride, padding, dilation, groups).

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16 (other floating-point types run on stock ops).
        weight: (K, C / groups, kh, kw), folded, of x's dtype.
        bias: (K,), folded, of x's dtype.
        stride, padding, dilation: an integer or (height, width).
        groups: of the convolution.

    Returns:
        (N, K, H', W') with H' = (H + 2·padding − dilation·(kh − 1) − 1) // stride + 1.

    Raises:
        ValueError: shapes, dtypes or devices don't fit; the message names the argument and the remedy.
        BackendError: a backend was chosen explicitly and can't serve.
    """
    return ops.conv2d_bn(x, weight, bias, *_geometry(x, weight, bias, stride, padding, dilation, groups))


@_renamed(bias="shift")
def conv2d_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with a batch norm folded in, and ReLU.

        y = relu(conv2d(x, weight) + bias)

    Stock equivalent: F.relu(bn(F.conv2d(x, …))) in inference. Arguments, result and errors as `conv2d_bn`.
    """
    return ops.conv2d_bn_relu(x, weight, bias, *_geometry(x, weight, bias, stride, padding, dilation, groups))


@_renamed(bias="shift")
def conv2d_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with a batch norm folded in, a residual added, and ReLU: the end of a residual block.

        y = relu(conv2d(x, weight) + bias + residual)

    Stock equivalent: F.relu(bn(F.conv2d(x, …)) + residual) in inference. Arguments, result and errors as `conv2d_bn`, and

    Args:
        residual: of the result's shape, dtype and device; it is not modified.
    """
    check_dims("residual", residual, 4, "(N, K, H', W')")
    geometry = _geometry(x, weight, bias, stride, padding, dilation, groups)
    return ops.conv2d_bn_add_relu(x, weight, bias, residual, *geometry)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Sum and ReLU in one pass.

        y = relu(x + residual)

    Stock equivalent: F.relu(x + residual).

    Args:
        x: (N, C, H, W), any floating-point dtype.
        residual: of x's shape, dtype and device; it is not modified.

    Returns:
        As x; channels_last if one of the two is.

    Raises:
        ValueError: shapes, dtypes or devices differ.
        BackendError: a backend was chosen explicitly and can't serve.
    """
    check_dims("x", x, 4, "(N, C, H, W)")
    check_residual(x, residual)
    return ops.add_relu(x, residual)


@_renamed(biases="shifts")
def basic_block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int = 1, padding: IntOrPair = 1
) -> Tensor:
    """The residual block of ResNet-18 and -34 with its batch norms folded in.

        y = relu(conv2(relu(conv1(x))) + shortcut(x))

    Stock equivalent: torchvision.models.resnet.BasicBlock in inference.

    Args:
        x: (N, C, H, W), dtypes as in `conv2d_bn`.
        weights: of conv1, (K, C, kh, kw), and conv2, (K, K, kh, kw), folded, of x's dtype; and for a projection shortcut of its
            convolution, (K, C, 1, 1). Without one the shortcut is x.
        biases: (K,) for each weight, folded, of x's dtype.
        stride: of conv1 and of the shortcut.
        padding: of conv1 and conv2.

    Returns:
        (N, K, H', W'), H' and W' as `conv2d_bn` gives them for conv1 and then conv2.

    Raises:
        ValueError: as `conv2d_bn`, or the number of weights or biases is wrong.
        BackendError: a backend was chosen explicitly and can't serve the block, nor its parts.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015.
    """
    _check_block("basic_block", weights, biases, 2)
    s, p = _pair("stride", stride), _pair("padding", padding)
    layers = [(s, p), ((1, 1), p), (s, (0, 0))][: len(weights)]
    return ops.basic_block(x, list(weights), list(biases), _flat(x, weights, biases, layers, (1, 1), 1))


@_renamed(biases="shifts")
def bottleneck(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int = 1,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """The residual block of ResNet-50 and deeper with its batch norms folded in.

        y = relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x)), conv1 and conv3 of 1×1, conv2 of 3×3

    Stock equivalent: torchvision.models.resnet.Bottleneck in inference.

    Args:
        x: (N, C, H, W), dtypes as in `conv2d_bn`.
        weights: of conv1, (M, C, 1, 1), conv2, (M, M / groups, 3, 3), and conv3, (K, M, 1, 1), folded, of x's dtype; and for a
            projection shortcut of its convolution, (K, C, 1, 1). Without one the shortcut is x.
        biases: one for each weight, (M,) or (K,), folded, of x's dtype.
        stride: of conv2 and of the shortcut (ResNet V1.5).
        dilation: of conv2, whose padding is the same.
        groups: of conv2 (ResNeXt).

    Returns:
        (N, K, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: as `conv2d_bn`, or the number of weights or biases is wrong.
        BackendError: a backend was chosen explicitly and can't serve the block, nor its parts.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015.
    """
    _check_block("bottleneck", weights, biases, 3)
    s, d = _pair("stride", stride), _pair("dilation", dilation)
    layers = [((1, 1), (0, 0)), (s, d), ((1, 1), (0, 0)), (s, (0, 0))][: len(weights)]
    return ops.bottleneck(x, list(weights), list(biases), _flat(x, weights, biases, layers, d, groups))


@_renamed(bias="shift")
def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: IntOrPair = 2,
    padding: IntOrPair = 3,
    pool_kernel: IntOrPair = 3,
    pool_stride: IntOrPair = 2,
    pool_padding: IntOrPair = 1,
) -> Tensor:
    """The entry of a ResNet: convolution with its batch norm folded in, ReLU and max-pool.

        y = max_pool2d(relu(conv2d(x, weight) + bias))

    Stock equivalent: F.max_pool2d(F.relu(bn(F.conv2d(x, …))), 3, 2, 1). Arguments and errors as `conv2d_bn`, and

    Args:
        pool_kernel, pool_stride, pool_padding: of the max-pool, an integer or (height, width); the padding is at most half of
            the kernel.

    Returns:
        (N, K, H", W") with H" = (H' + 2·pool_padding − pool_kernel) // pool_stride + 1, H' as in `conv2d_bn`.
    """
    geometry = _geometry(x, weight, bias, stride, padding, 1, 1)
    window = [*_pair("pool_kernel", pool_kernel), *_pair("pool_stride", pool_stride), *_pair("pool_padding", pool_padding)]
    if 2 * window[4] > window[0] or 2 * window[5] > window[1]:
        raise ValueError(
            f"pool_padding is {pool_padding!r}; it must be at most half of pool_kernel, which is {pool_kernel!r}. Pass less "
            "padding or a larger kernel."
        )
    return ops.stem(x, weight, bias, [*geometry[0], *geometry[1], *geometry[2], geometry[3]], window)


def _pair(name: str, value: IntOrPair) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list, torch.Size)) else ()
    minimum = 0 if "padding" in name else 1
    if len(pair) != 2 or not all(isinstance(v, int) and v >= minimum for v in pair):
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {minimum}, or two of them: (height, width).")
    return pair


def _geometry(
    x: Tensor, weight: Tensor, bias: Tensor, stride: IntOrPair, padding: IntOrPair, dilation: IntOrPair, groups: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    check_dims("x", x, 4, "(N, C, H, W)")
    _check_parameters(weight, bias, "weight", "bias")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups is {groups!r}; it must be a positive divisor of the {weight.shape[0]} output channels.")
    return _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups


def _check_parameters(weight: Tensor, bias: Tensor, weight_name: str, bias_name: str) -> None:
    check_dims(weight_name, weight, 4, "(out_channels, in_channels / groups, kh, kw)")
    if tuple(bias.shape) != (weight.shape[0],) or bias.dtype != weight.dtype:
        raise ValueError(
            f"{bias_name} is {tuple(bias.shape)} {bias.dtype}; it must be ({weight.shape[0]},) {weight.dtype}, one for each "
            f"output channel of {weight_name}. `fold_bn` gives both."
        )


def _check_block(op: str, weights: Sequence[Tensor], biases: Sequence[Tensor], main: int) -> None:
    if len(weights) not in (main, main + 1) or len(biases) != len(weights):
        raise ValueError(
            f"weights has {len(weights)} and biases {len(biases)} tensors; {op} takes {main} of each, or {main + 1} with a "
            "projection shortcut, which comes last."
        )


def _flat(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    dilation: tuple[int, int],
    groups: int,
) -> list[int]:
    """The operator's geometry: dilation and groups belong to the second convolution alone."""
    check_dims("x", x, 4, "(N, C, H, W)")
    flat: list[int] = []
    for i, (weight, bias, (stride, padding)) in enumerate(zip(weights, biases, layers, strict=True)):
        _check_parameters(weight, bias, f"weights[{i}]", f"biases[{i}]")
        second = i == 1
        conv = Conv.of(weight, stride, padding, dilation if second else (1, 1), groups if second else 1)
        flat += conv.flatten()
    return flat
