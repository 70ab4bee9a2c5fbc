"""Convolutions with their norm and activation inside, as detectron2 has them: `Conv2d(…, norm=…, activation=…)`.

Their forward looks at the batch size, so it can't be traced. What it computes is read from the attributes, and compared with
what the module really computes on a small input before it is believed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fused.backends import Precision
from resnet_fused.fusion.tracing import RELU_FUNCTIONS
from resnet_fused.modules.folding import NotFoldable, hooks_of
from resnet_fused.modules.fused import FusedConv2d


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is a subclass of nn.Conv2d with attributes `norm` and `activation`."""
    return isinstance(module, nn.Conv2d) and hasattr(module, "norm") and hasattr(module, "activation")


@torch.no_grad()
def fuse_wrapped(module: nn.Module, precision: Precision, backend: str) -> FusedConv2d:
    """The fused module that computes what the wrapped convolution does.

    Raises:
        NotFoldable: with the reason.
    """
    assert isinstance(module, nn.Conv2d)
    hooks = hooks_of(module)
    if hooks is not None:
        raise NotFoldable(f"the convolution has {hooks}")
    norm = module.norm
    if not isinstance(norm, nn.Module):
        raise NotFoldable("no batch norm follows")
    activation = module.activation
    relu = activation in RELU_FUNCTIONS or type(activation) is nn.ReLU
    if activation is not None and not relu:
        raise NotFoldable(f"{getattr(activation, '__name__', type(activation).__name__)} follows; only ReLU is fused")
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.bias is not None,
        module.padding_mode,
        device="meta",
    )
    plain.weight, plain.bias = module.weight, module.bias
    fused = FusedConv2d.of(plain, norm, relu, precision, backend)
    _check_probe(module, plain, norm, relu)
    return fused


def _check_probe(module: nn.Conv2d, plain: nn.Conv2d, norm: nn.Module, relu: bool) -> None:
    size = [max(4, d * (k - 1) + 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    count = module.in_channels * size[0] * size[1]
    x = torch.linspace(-2, 2, count, device=module.weight.device, dtype=torch.float64)
    x = x.view(1, module.in_channels, *size).to(module.weight.dtype)
    want: Tensor = norm(plain(x))
    want = want.relu() if relu else want
    got = module(x.clone())
    if got.shape != want.shape or not torch.equal(got, want):
        raise NotFoldable(f"{type(module).__name__} computes something else than activation(norm(convolution))")
