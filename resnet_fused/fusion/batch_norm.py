"""Batch norm with what follows it, in training and wherever a derivative is asked for, on the module that holds its parameters.

    bn(norm, x) = norm(x)
    bn_relu(norm, x) = relu(norm(x))
    bn_relu_conv2d(norm, conv, x) = conv(relu(norm(x)))
    bn_add_relu(norm, x, residual) = relu(norm(x) + residual)
    conv2d(conv, x) = conv(x)

`norm` keeps all of its behaviour: momentum, running statistics and their count, the affine parameters or their absence, the
exchange between processes of nn.SyncBatchNorm. What the ops don't serve runs by the module's own forward, as stock does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from resnet_fused import ops
from resnet_fused.backends.batch_norm import beats_stock
from resnet_fused.ops import training_conv2d
from resnet_fused.ops.common import update_statistics
from resnet_fused.runtime.calls import autocast_dtype, memory_format, plain, stock_only
from resnet_fused.runtime.folding import hooks_of

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FunctionalNorm(NamedTuple):
    """A call of F.batch_norm, with the names that nn.BatchNorm2d has for its arguments.

    Whoever calls it counts its steps by itself.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    num_batches_tracked: None = None

    @property
    def track_running_stats(self) -> bool:
        return self.running_mean is not None and self.running_var is not None

    @property
    def num_features(self) -> int | None:
        return next((t.numel() for t in self[:4] if t is not None), None)


def bn(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x)."""
    y = fused(norm, x, None, relu=False)
    return norm(x) if y is None else y


def bn_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x))."""
    y = fused(norm, x, None, relu=True)
    return F.relu(norm(x), inplace=True) if y is None else y


def bn_add_relu(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """relu(norm(x) + residual)."""
    y = fused(norm, x, residual, relu=True)
    if y is None:
        y = norm(x)
        y += residual
        return F.relu(y, inplace=True)
    return y


def fused(norm: nn.Module | FunctionalNorm, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor | None:
    """norm(x) with a sum (which only a ReLU may follow) and ReLU, as one op; None, with nothing done, where stock must run."""
    if not _fusible(norm, x, residual, relu):
        return None
    if residual is not None:
        return _run(ops.bn_add_relu, norm, x, residual)
    return _run(ops.bn_relu if relu else ops.bn, norm, x)


def _fusible(norm: Any, x: Tensor, residual: Tensor | None, relu: bool) -> bool:
    """Whether the op computes what the module's forward does, and a backend serves it better than stock PyTorch."""
    if not isinstance(x, Tensor):
        return False  # a tracer's stand-in
    if type(norm) is not FunctionalNorm and (type(norm) not in _NORMS or hooks_of(norm) is not None):
        return False
    if module_hooks._has_any_global_hook():
        return False
    if x.layout is not torch.strided or x.dim() != 4 or norm.num_features not in (None, x.shape[1]) or not norm.eps > 0:
        return False  # oneDNN's own layout runs as in stock, and stock's forward raises the errors that users know
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        return False
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if t is not None and (t.device != x.device or (t.dtype != x.dtype and t.dtype != torch.float32)):
            return False
    if stock_only() or not (torch.compiler.is_compiling() or plain(x, residual, norm.weight, norm.bias)):
        return False
    if _group(norm) is not None:
        return True
    return x.numel() > 0 and beats_stock(x, residual is not None, relu)


def _group(norm: Any) -> str | None:
    """Name of the group of processes that share the batch's statistics; None where each has its own."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    processes: Any = norm.process_group or dist.group.WORLD
    return processes.group_name if dist.get_world_size(processes) > 1 else None


def conv2d(conv: Any, x: Tensor) -> Tensor:
    """conv(x)."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or not _plain_conv(conv, x):
        return conv(x)
    if stock_only() or not (torch.compiler.is_compiling() or plain(x)):
        return conv(x)
    dtype = autocast_dtype(x.device.type)
    if dtype is None and _on_one_pixel(conv, x):
        return _linear(conv, x)
    if conv.bias is not None:
        return conv(x)
    if dtype is not None:
        x = x.to(dtype)
    if training_conv2d.beats_stock(x, conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups):
        return ops.conv2d(x, conv.weight, conv.stride[0], conv.padding[0])
    return conv(x)


def _on_one_pixel(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 1×1 convolution reads images of one pixel, as those of a squeeze-and-excite do, on a CPU in float32.

    A product of matrices takes half of oneDNN's time or less, forward and backward (16 images, 120 to 888 channels, Zen 5).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[2:] != (1, 1) or x.numel() == 0:
        return False
    if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding != (0, 0) or torch.compiler.is_compiling():
        return False
    # Products of matrices have a setting of their own, by which they may be computed in bfloat16.
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


def _linear(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Such a convolution as the product of matrices that it is, with the strides of its result."""
    y = F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)
    n, c = y.shape
    if memory_format(x, conv.weight) == torch.channels_last:
        return y.view(n, 1, 1, c).permute(0, 3, 1, 2)
    return y.view(n, c, 1, 1)


def bn_relu_conv2d(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """conv(relu(norm(x))), where the input of conv isn't kept for backward but computed again."""
    if not _fusible(norm, x, None, relu=True) or not _plain_conv(conv, x):
        return conv(bn_relu(norm, x))
    weight, bias = conv.weight, conv.bias
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
    mean, var, group = _statistics(norm, x)
    z, *batch = ops.bn_relu_conv2d(
        *(x, norm.weight, norm.bias, mean, var, weight, bias, norm.eps, group),
        *(conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    _update(norm, batch[0], batch[2])
    return z


def _plain_conv(conv: Any, x: Tensor) -> bool:
    """Whether conv is nn.Conv2d and no more, with zero padding in pixels, on an input of its dtype or under autocast."""
    if type(conv) is not nn.Conv2d or hooks_of(conv) is not None or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str) or conv.in_channels != x.shape[1] or conv.weight.device != x.device:
        return False
    if not torch.compiler.is_compiling() and not plain(conv.weight, conv.bias):
        return False
    return conv.weight.dtype == x.dtype or (autocast_dtype(x.device.type) is not None and x.dtype != torch.float64)


def _run(op: Callable[..., tuple[Tensor, ...]], norm: Any, x: Tensor, *residual: Tensor) -> Tensor:
    mean, var, group = _statistics(norm, x)
    y, *batch = op(x, *residual, norm.weight, norm.bias, mean, var, norm.eps, group)
    _update(norm, batch[0], batch[2])
    return y


def _statistics(norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    """Mean and variance to normalise with, None for the batch's own, and the group of processes that share the batch."""
    # As nn.modules.batchnorm._BatchNorm.forward: in eval mode the running statistics, where there are any.
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        return norm.running_mean, norm.running_var, ""
    group = _group(norm)
    if group is None and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}: the variance of one value "
            "is not defined. Use a larger batch or image, or put the batch norm into eval mode."
        )
    return None, None, group or ""


def _update(norm: Any, mean: Tensor, var: Tensor) -> None:
    """In training, moves the running statistics towards the batch's; `var` is unbiased."""
    if not norm.training or not norm.track_running_stats:
        return
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean over all batches; as a tensor, which a GPU needn't be waited for
            share = norm.num_batches_tracked.reciprocal() if norm.num_batches_tracked is not None else 0.0
        else:
            share = norm.momentum
        update_statistics(norm.running_mean, mean, share)
        update_statistics(norm.running_var, var, share)
