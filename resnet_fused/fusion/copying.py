"""Copies of models."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, each module in the mode of the original.

    Models that hold computed tensors, as weight_norm and pruning leave them, are copied too, which deepcopy refuses.
    """
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in computed}
    copied = copy.deepcopy(model, memo)
    # torchvision's feature extractors come out of a deepcopy in training mode.
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if module.training != modes.get(name, module.training):
            module.train(modes[name])
    return copied


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
