"""What a call of a kernel depends on beside its values: who watches it, settings, the format and the state of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from resnet_fused.backends import STOCK, BackendError


def _vmapped() -> bool:
    """Whether torch.vmap is at work, perhaps outside of another transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in torch._C._functorch.get_interpreter_stack())


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Stock PyTorch's rule for a convolution's result: channels_last if the input or a weight is, else contiguous.

    In one dimension and in three, where formats have other names or none, channels_last stands for channels in the last place.
    """
    if _vmapped():
        return torch.contiguous_format  # tensors can't be asked for another
    # Tensors without strides have no format to ask for.
    channels_last = any(tensor.layout is torch.strided and suggests_channels_last(tensor) for tensor in tensors)
    return torch.channels_last if channels_last else torch.contiguous_format


def suggests_channels_last(x: Tensor) -> bool:
    """Whether stock PyTorch takes a tensor for channels_last, by its strides. In one dimension it is asked as one of height 1.

    Source: c10/core/MemoryFormat.h, is_channels_last_strides_2d and 3d.
    """
    if x.dim() == 4 and 1 not in x.shape:
        # Of dense tensors it is known at once.
        last = x.is_contiguous(memory_format=torch.channels_last)
        if last != x.is_contiguous():
            return last
    smallest = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[dim], x.stride(dim)
        # The last is of tensors of one value an image, whose strides tell nothing.
        if (dim == 1 and stride == 0) or size == 0 or stride < smallest or (dim == 0 and smallest == x.stride(1)):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def choice_without_strides(chosen: str) -> str:
    """The backend for tensors in oneDNN's own layout (`x.to_mkldnn()`), which have no strides and run on stock ops alone.

    Raises:
        BackendError: another one was chosen explicitly.
    """
    if chosen not in ("auto", STOCK):
        raise BackendError(
            f"backend {chosen!r} can't serve tensors of layout torch._mkldnn, which only stock ops do. Pass x.to_dense(), or "
            "choose 'auto' or 'reference'."
        )
    return STOCK


def call_key(x: Tensor, residual: Tensor | None, chosen: str) -> tuple[Any, ...]:
    """What the kernel of a call with strided tensors depends on, beside the op and its parameters."""
    other = None if residual is None else (residual.shape, residual.dtype)
    return x.shape, x.stride(), x.dtype, x.device, other, chosen, torch._C._get_mkldnn_enabled()


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but backward differentiation watches a call: eager, plain tensors.

    Otherwise it goes through the dispatcher, which knows tracing and subclasses, or is `stock_only`.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _transformed():
        return False
    if torch._C._is_tracing():  # by torch.jit.trace, which would note down kernels of this process
        return False
    # A loop, since a generator takes twice as long, and this stands before every call of every op.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a derivative by one of the tensors may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether a call may go to a backend's kernel directly: nothing watches it, not even autograd."""
    return plain(*tensors) and not needs_grad(*tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; under no_grad, too, which doesn't end them."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def stock_only() -> bool:
    """Whether a call needs rules that stock ops have and ours don't: torch.func's, forward-mode differentiation's, ONNX's."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return torch.onnx.is_in_onnx_export()
    return _transformed()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a type of device; None where it is off, or the device has none ("meta")."""
    # Asked first for any device, since the question for one takes as long as all else before a call.
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
