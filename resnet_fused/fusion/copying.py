"""Copies of models."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resnet_fused.runtime.parameters import with_memory


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, each module in the mode of the original.

    Models that hold computed tensors, as weight_norm and pruning leave them, are copied too, which deepcopy refuses.
    """
    with torch.enable_grad():
        memo: dict[int, object] = {id(t): t.detach().requires_grad_(t.requires_grad).clone() for t in _computed_tensors(model)}
    copied = copy.deepcopy(model, memo)
    # torchvision's feature extractors come out of a deepcopy in training mode.
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if module.training != modes.get(name, module.training):
            module.train(modes[name])
    return copied


def _computed_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors among a model's attributes, and in lists, tuples and dicts there, that autograd knows the history of."""
    found: list[Tensor] = []
    held: list[object] = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while held:
        value = held.pop()
        if isinstance(value, Tensor):
            found += [] if value.is_leaf else [value]
        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            held += value.values() if isinstance(value, dict) else value
    return found


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that have memory."""
    return with_memory([*model.parameters(), *model.buffers()])
