"""Batch norm with what follows it, in training and wherever a derivative is asked for, on the module that holds its parameters.

    bn(norm, x) = norm(x)     bn_relu(norm, x) = relu(norm(x))     bn_add_relu(norm, x, residual) = relu(norm(x) + residual)

`norm` keeps all of its behaviour: momentum, running statistics and their count, the affine parameters or their absence, the
exchange between processes of nn.SyncBatchNorm. What the ops don't serve runs by the module's own forward, as stock does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from resnet_fused import ops
from resnet_fused.backends.norm import served
from resnet_fused.modules.folding import hooks_of
from resnet_fused.ops.common import plain

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def bn(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x)."""
    return _run("bn", norm, x, None) if _fusible("bn", norm, x, None) else norm(x)


def bn_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x))."""
    return _run("bn_relu", norm, x, None) if _fusible("bn_relu", norm, x, None) else F.relu(norm(x), inplace=True)


def bn_add_relu(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """relu(norm(x) + residual)."""
    if _fusible("bn_add_relu", norm, x, residual):
        return _run("bn_add_relu", norm, x, residual)
    y = norm(x)
    y += residual
    return F.relu(y, inplace=True)


def _fusible(op: str, norm: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the op computes what the module's forward does, and a backend serves it better than stock PyTorch."""
    if type(norm) not in _NORMS or hooks_of(norm) is not None or module_hooks._has_any_global_hook():
        return False
    if x.dim() != 4 or x.shape[1] != norm.num_features:
        return False  # stock's forward raises the error that users know
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        return False
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if t is not None and (t.device != x.device or (t.dtype != x.dtype and t.dtype != torch.float32)):
            return False
    if not torch.compiler.is_compiling() and (_transformed() or not plain(x, residual, norm.weight, norm.bias)):
        return False
    if _group(norm) is not None:
        return True
    return x.numel() > 0 and served(op, x)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which stock ops have rules and ours don't."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _group(norm: nn.Module) -> str | None:
    """Name of the group of processes that share the batch's statistics; None where each has its own."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    processes = norm.process_group or dist.group.WORLD
    return processes.group_name if dist.get_world_size(processes) > 1 else None


def _run(op: str, norm: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    # Mean and variance of the buffers count where they are given; see nn.modules.batchnorm._BatchNorm.forward.
    batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    group = _group(norm)
    if batch and group is None and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}: the variance of one value "
            "is not defined. Use a larger batch or image, or put the batch norm into eval mode."
        )
    mean, var = (None, None) if batch else (norm.running_mean, norm.running_var)
    inputs = (x,) if residual is None else (x, residual)
    call = getattr(ops, op)
    y, batch_mean, _, batch_var = call(*inputs, norm.weight, norm.bias, mean, var, norm.eps, group or "")
    if norm.training and norm.track_running_stats:
        _update(norm, batch_mean, batch_var)
    return y


def _update(norm: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics towards the batch's; `var` is unbiased."""
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
            if running is None:
                continue
            if norm.momentum is None:  # the mean over all batches; as a tensor, which a GPU needn't be waited for
                share = norm.num_batches_tracked.to(running.dtype).reciprocal()
            else:
                share = norm.momentum
            running.lerp_(new.to(running.dtype), share)
