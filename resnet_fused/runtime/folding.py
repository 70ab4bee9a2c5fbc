"""Folding a batch norm in inference into the convolution before it: the arithmetic, and why it isn't safe where it isn't.

bn(conv(x)) = conv'(x) + shift,   conv'.weight = conv.weight · scale,   shift = (conv.bias − mean) · scale + beta,
scale = gamma / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_VALUES = 128 * 1024  # of a weight that are scaled together


def affine(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of y = (x − mean) · gamma / sqrt(var + eps) + beta, float64. All of shape (C,), or None for 1 and 0."""
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def scale_and_shift(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and shift of y = x · scale + shift, as `affine`, in a dtype.

    The shift is that of the rounded scale: where x is near the mean, which may be large, the scale's rounding error cancels.
    """
    scale = affine(mean, var, gamma, beta, eps)[0].to(dtype)
    shift = -mean.double() * scale.double()
    return scale, (shift if beta is None else shift + beta.double()).to(dtype)


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


class NotFoldable(Exception):
    """A convolution or batch norm can't be folded; the message is the reason, as the report prints it."""


def hooks_of(module: nn.Module) -> str | None:
    """What a module was given that is not of its class: hooks, or a forward of its own; None if nothing."""
    forward = vars(module).get("forward")
    # A fast path stands for the forward that was there before it.
    if getattr(forward, "previous", forward) is not None:
        return "a forward of its own"
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(module, name, None):
            return name.strip("_").replace("_", " ")
    return None


def _check_common(module: nn.Module, kind: str) -> None:
    if parametrize.is_parametrized(module):
        raise NotFoldable(f"the {kind} is parametrized ({', '.join(module.parametrizations)})")  # type: ignore[arg-type]
    if hasattr(module, "weight_orig") or hasattr(module, "weight_g"):
        raise NotFoldable(f"the {kind}'s weight is computed by weight_norm, spectral_norm or pruning")
    hooks = hooks_of(module)
    if hooks is not None:
        raise NotFoldable(f"the {kind} has {hooks}")
    for name, parameter in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if parameter.is_meta:
            raise NotFoldable(f"the {kind}'s {name} is on the meta device")


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""PyTorch's layers of one, two and three dimensions."""


def check_conv(conv: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """`conv` if it is a plain convolution whose weight may be scaled; raises NotFoldable with the reason otherwise."""
    if not isinstance(conv, CONVOLUTIONS):
        raise NotFoldable(f"{type(conv).__name__} is not nn.Conv2d")
    stock = next(kind for kind in CONVOLUTIONS if isinstance(conv, kind))
    if type(conv).forward is not stock.forward or type(conv)._conv_forward is not stock._conv_forward:
        raise NotFoldable(f"{type(conv).__name__} computes something else than nn.{stock.__name__}")
    _check_common(conv, "convolution")
    if not conv.weight.is_floating_point():
        raise NotFoldable(f"the convolution's weight is {conv.weight.dtype}, not a floating-point type")
    return conv


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a batch norm over channels: torch's own, or a FrozenBatchNorm2d.

    A class of torch's with a forward of its own, such as timm's BatchNormAct2d, is none: its forward tells what it computes.
    """
    if isinstance(module, (*NORMS, nn.SyncBatchNorm)):
        return type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return type(module).__name__ == "FrozenBatchNorm2d"


def dims_of_norm(norm: nn.Module) -> int | None:
    """How many spatial dimensions a batch norm takes; None for any number."""
    if isinstance(norm, nn.SyncBatchNorm):
        return None
    return next((dims for dims, kind in enumerate(NORMS, 1) if isinstance(norm, kind)), 2)


def check_norm(norm: nn.Module) -> nn.Module:
    """`norm` if it is, in its present mode, a fixed scale and shift by channel; raises NotFoldable otherwise."""
    if not is_norm(norm):
        raise NotFoldable(f"{type(norm).__name__} is not a batch norm")
    _check_common(norm, "batch norm")
    if isinstance(norm, (*NORMS, nn.SyncBatchNorm)):
        base = nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else nn.BatchNorm2d  # whose forward all of them share
        if type(norm).forward is not base.forward:
            raise NotFoldable(f"{type(norm).__name__} computes something else than nn.{base.__name__}")
        if norm.training:
            raise NotFoldable("the batch norm is in training mode; call model.eval() first")
        if norm.running_mean is None or norm.running_var is None:
            raise NotFoldable("the batch norm has no running statistics (track_running_stats=False)")
        check_eps(norm.eps)
    return norm


def check_eps(eps: float) -> None:
    """Raises NotFoldable where F.batch_norm may refuse eps: all releases of PyTorch do below 0, those before 2.12 also 0."""
    if not eps > 0:
        raise NotFoldable(f"the batch norm's eps is {eps}, not above 0")


def probe(norm: nn.Module) -> None:
    """Compares a batch norm that is known only by its name with what is read from its attributes, on a few values.

    Raises:
        NotFoldable: it computes something else.
    """
    if isinstance(norm, (*NORMS, nn.SyncBatchNorm)):
        return
    mean, var, gamma, beta = (getattr(norm, name, None) for name in ("running_mean", "running_var", "weight", "bias"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise NotFoldable(f"{type(norm).__name__} has no running statistics")
    _check_probe(norm, *affine(mean, var, gamma, beta, float(getattr(norm, "eps", 0.0))))


def check_overflow(weight: Tensor, shift: Sequence[Tensor | None], var: Tensor, gamma: Tensor | None, eps: float) -> None:
    """Raises NotFoldable where folded parameters overflow float16, whose range stock's batch norm, in float32, doesn't know.

    Args:
        weight: of the convolution.
        shift: the vectors that the batch norm's scale multiplies: the convolution's bias and the mean.
        var, gamma, eps: of the batch norm.
    """
    if weight.dtype != torch.float16 or weight.numel() == 0:
        return
    scale = ((var.double() + eps).rsqrt() * (1 if gamma is None else gamma.double())).abs()
    largest = [weight.detach().double().abs().flatten(1).amax(1), *(t.detach().double().abs() for t in shift if t is not None)]
    if is_finite(weight) and not all(bool((t * scale <= torch.finfo(weight.dtype).max).all()) for t in largest):
        raise NotFoldable(f"the folded parameters overflow {weight.dtype}")


def _check_probe(norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Runs a batch norm known only by its name on a few values, and compares it with the scale and shift read from it."""
    channels = scale.numel()
    x = torch.linspace(-2, 2, 3 * channels, device=scale.device, dtype=torch.float64).view(1, channels, 1, 3)
    x = x.to(next(norm.buffers()).dtype)
    with torch.no_grad():
        got = norm(x).double()
    want = x.double() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    tolerance = 64 * torch.finfo(x.dtype).eps
    size = (x.double() * scale.view(1, -1, 1, 1)).abs() + shift.abs().view(1, -1, 1, 1) + 1
    if got.shape != want.shape or not bool(((got - want).abs() <= tolerance * size).all()):
        raise NotFoldable(f"{type(norm).__name__} computes something else than (x − mean) · weight / sqrt(var + eps) + bias")
