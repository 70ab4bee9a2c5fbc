"""torch.jit.script of a fused model: it compiles the source of forwards, and so gets the model without its fast paths."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from resnet_fused import config
from resnet_fused.fusion.path import FastPath

_HOOK = "__prepare_scriptable__"  # by which torch.jit.script asks a module for what it is to compile


class _Prepare:
    """The hook of every module with a fast path.

    It finds the module in its caller, torch.jit's call_prepare_scriptable_func: a shallow copy has the hook of its original.
    """

    def __call__(self) -> nn.Module:
        _say()
        return without_paths(sys._getframe(1).f_locals["obj"], {})

    def __reduce__(self) -> str:
        return "PREPARE"  # copies and pickles are this object


PREPARE = _Prepare()


@functools.cache
def _say() -> None:
    config.logger().warning(
        "torch.jit.script compiles the source of a model: what it makes of a fused one runs as stock. A module around it "
        "has its plain copy from now on; fuse it again. For fused kernels use torch.jit.trace, torch.compile, torch.export."
    )


def install_hook(module: nn.Module) -> None:
    """Lets a module with a fast path be scripted."""
    vars(module)[_HOOK] = PREPARE


def remove_hook(module: nn.Module) -> None:
    """Takes the hook out again."""
    if vars(module).get(_HOOK) is PREPARE:
        del vars(module)[_HOOK]


def without_paths(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module, and of those in it, that has no fast path. Parameters and buffers are the module's own.

    Args:
        module: the module.
        made: copies so far, by the identity of what they are copies of.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return module
    copied = made.get(id(module))
    if copied is not None:
        return copied
    copied = made[id(module)] = object.__new__(type(module))
    own: dict[str, Any] = vars(copied)
    own.update(vars(module))
    own["_modules"] = {n: child and without_paths(child, made) for n, child in module._modules.items()}
    remove_hook(copied)
    path = own.get("forward")
    if isinstance(path, FastPath):
        del own["forward"]
        if path.previous is not None:
            own["forward"] = path.previous
    if isinstance(own.get("_path"), FastPath):
        own["_path"] = None
    if isinstance(getattr(own.get("extra_repr"), "__self__", None), FastPath):
        del own["extra_repr"]
    return copied
