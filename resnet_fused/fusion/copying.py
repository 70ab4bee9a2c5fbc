"""Copies of models, and of their tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def copy_of(model: nn.Module, share_tensors: bool = False) -> nn.Module:
    """A deep copy, each module in the mode of the original.

    Models that hold computed tensors, as weight_norm and pruning leave them, are copied too, which deepcopy refuses.

    Args:
        share_tensors: whether the copy has the model's own parameters and buffers.
    """
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    memo = {id(tensor): tensor.detach().clone() for tensor in computed}
    if share_tensors:
        memo.update((id(tensor), tensor) for tensor in tensors_of(model))
    copied = copy.deepcopy(model, memo)
    # torchvision's feature extractors come out of a deepcopy in training mode.
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if module.training != modes.get(name, module.training):
            module.train(modes[name])
    return copied


def copy_shared_tensors(fused: nn.Module, original: nn.Module) -> None:
    """Copies the parameters and buffers that the fused model still shares with the original."""

    def memory(tensor: Tensor) -> int:
        strided = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
        return (tensor.untyped_storage().data_ptr() if strided else 0) or id(tensor)

    shared = set(map(memory, tensors_of(original)))
    memo: dict[int, Any] = {}
    for module in fused.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in places:
            for name, tensor in held.items():
                if tensor is not None and memory(tensor) in shared:
                    held[name] = copy.deepcopy(tensor, memo)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
