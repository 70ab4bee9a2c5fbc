"""Which calls of a program ask for sizes, or compute with them: their results are the same for all inputs of a kind."""

from __future__ import annotations

from collections.abc import Container

import torch

from resnet_fused.runtime.program import Call, FusedStep

_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement")
_ON_NUMBERS = ("_operator", "math")
# Beside steps, and calls that don't depend on the format: what has a result whose shape follows from shapes alone.
_SHAPED = (torch.cat, torch.concat, torch.concatenate, "view", "reshape", "flatten", "unsqueeze", "expand_as", "mean")


def asks_for_sizes(call: Call, shaped: Container[int], numbers: Container[int]) -> bool:
    """Whether a call's result is known from the kind of the program's inputs.

    Args:
        call: the call.
        shaped: values that are tensors whose shape follows from the kind of the program's inputs.
        numbers: values that are results of such calls.
    """
    if not call.reads:
        return False
    if all(read in numbers for read in call.reads):
        return call.kind == "call_function" and (
            getattr(call.target, "__module__", "") in _ON_NUMBERS or call.target is torch._assert
        )
    asks = call.target in _METHODS if call.kind == "call_method" else call.target is getattr and call.args[1] in _ATTRIBUTES
    return asks and all(read in shaped or read in numbers for read in call.reads)


def shape_follows(item: FusedStep | Call, shaped: Container[int], numbers: Container[int]) -> bool:
    """Whether the shape of an item's result follows from the kind of the program's inputs; arguments as above."""
    if isinstance(item, Call):
        layer = item.kind == "call_module" and item.pure
        if not (layer or item.transparent or item.fast or item.target in _SHAPED):
            return False
    return all(read in shaped or read in numbers for read in item.reads)
