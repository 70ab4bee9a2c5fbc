"""A copy of a model's structure in which its forward can run on stand-ins for tensors without anybody noticing.

Every module has a shadow of its own class, with the same parameters and buffers, and copies of the plain containers and objects
that it holds as attributes. What a forward does to itself happens to the shadow: `changed` tells of it afterwards. Nothing is
patched, in the model or in PyTorch, so other threads may run the model, or trace it, meanwhile.
"""

from __future__ import annotations

import collections
import enum
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTAINERS = (list, dict, set, OrderedDict, collections.defaultdict, collections.deque)
_IMMUTABLE: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
# Whose objects are taken as they are: none of them is changed by its use in a forward.
_KNOWN = ("torch", "typing", "functools", "re", "resnet_fused", "operator")
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def is_immutable(value: Any) -> bool:
    """Whether a value can't change: numbers, strings, PyTorch's own constants, and tuples of these."""
    if type(value) in (tuple, frozenset):
        return all(map(is_immutable, value))
    return isinstance(value, _IMMUTABLE)


def is_object(value: Any) -> bool:
    """Whether a value is an object of someone's class, whose attributes may be read and changed."""
    return hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, *_CODE, *_IMMUTABLE))


def is_own(value: Any) -> bool:
    """Whether a value is the library's: a fast path that stands in a module."""
    return type(getattr(value, "__self__", value)).__module__.startswith("resnet_fused.fusion")


def class_containers(kind: type) -> dict[str, Any]:
    """Lists, dicts and sets that a class and its bases hold, by name."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("torch."):
            found.update((k, v) for k, v in vars(base).items() if type(v) in _CONTAINERS and not k.startswith("__"))
    return found


class Untouchable(Exception):
    """A forward used something that it holds and that can't be copied, such as a lock or a file."""


class _Sealed:
    """Stands for what can't be copied: any use of it ends the trace."""

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "_kind", kind)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Untouchable(f"uses a {object.__getattribute__(self, '_kind')} that it holds")

    __getattr__ = __setattr__ = __call__ = __enter__ = __exit__ = __iter__ = __next__ = __len__ = __getitem__ = _refuse
    __setitem__ = __contains__ = __bool__ = __add__ = __radd__ = __mul__ = __rmul__ = __eq__ = __lt__ = __gt__ = _refuse
    __hash__ = object.__hash__


class Sandbox:
    """The shadows of a module and of all modules in it. `root` is the shadow of the module itself."""

    def __init__(self, module: nn.Module) -> None:
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that ids in the memo stay theirs
        self._original: dict[int, nn.Module] = {}
        self.root: Any = self._shadow(module)

    def shadow(self, module: nn.Module) -> Any:
        """The shadow of a module."""
        return self._memo[id(module)]

    def original(self, shadow: Any) -> nn.Module:
        """The module that a shadow stands for."""
        return self._original[id(shadow)]

    def shadows(self) -> Iterator[tuple[nn.Module, Any]]:
        """Every module with its shadow."""
        for shadow in [s for s in self._kept if id(s) in self._original]:
            yield self._original[id(shadow)], shadow

    def _shadow(self, module: nn.Module) -> Any:
        found = self._memo.get(id(module))
        if found is not None:
            return found
        shadow = object.__new__(type(module))
        self._remember(module, shadow)
        self._original[id(shadow)] = module
        own = vars(shadow)
        for name, value in class_containers(type(module)).items():
            own[name] = self._copy(value)
        for name, value in vars(module).items():
            if name in HOOKS:
                own[name] = OrderedDict()
            elif name == "_modules":
                own[name] = {key: None if child is None else self._shadow(child) for key, child in value.items()}
            elif name in ("_parameters", "_buffers"):
                own[name] = dict(value)
            else:
                own[name] = self._copy(value)
        return shadow

    def _remember(self, value: Any, copied: Any) -> None:
        self._memo[id(value)] = copied
        self._kept += (value, copied)

    def _copy(self, value: Any) -> Any:
        """The value itself where it can't change, else a copy, with modules replaced by their shadows."""
        if isinstance(value, nn.Module):
            return self._shadow(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._shadow(value.__self__))
        if is_immutable(value) or isinstance(value, (Tensor, *_CODE)) or is_own(value):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if type(value) is tuple:
            return tuple(map(self._copy, value))
        if type(value) in _CONTAINERS:
            copied = value.copy()
            self._remember(value, copied)
            if isinstance(copied, dict):
                for key in copied:
                    copied[key] = self._copy(copied[key])
            elif isinstance(copied, (list, collections.deque)):
                for index, item in enumerate(value):
                    copied[index] = self._copy(item)
            return copied
        if is_object(value) and type(value).__reduce_ex__ is object.__reduce_ex__:
            try:
                copied = object.__new__(type(value))
            except TypeError:  # one whose memory isn't Python's
                return value
            self._remember(value, copied)
            vars(copied).update((k, self._copy(v)) for k, v in vars(value).items())
            return copied
        if type(value).__module__.split(".")[0] in _KNOWN:
            return value
        sealed = _Sealed(type(value).__name__)
        self._remember(value, sealed)
        return sealed

    def holds(self, value: Any) -> bool:
        """Whether a value is a container or object that belongs to the sandbox, and not one that a forward has made."""
        return any(value is kept for kept in self._kept)

    def changed(self, module: nn.Module) -> str | None:
        """Name of an attribute that a module's shadow has, or holds, differently; None if there is none."""
        shadow, names = vars(self.shadow(module)), vars(module)
        for name in {**names, **shadow}:
            if name in HOOKS or name == "forward":
                continue
            if name in names:
                original = names[name]
            elif name in class_containers(type(module)):
                original = class_containers(type(module))[name]
            else:
                return name
            if name not in shadow or not self._same(original, shadow[name], set()):
                return name
        return None

    def _same(self, value: Any, copied: Any, seen: set[int]) -> bool:
        if value is copied or (type(copied) is _Sealed and copied is self._memo.get(id(value))):
            return True
        if isinstance(value, nn.Module):
            return copied is self._memo.get(id(value))
        if isinstance(value, types.MethodType):
            return isinstance(copied, types.MethodType) and value.__func__ is copied.__func__
        if type(value) is not type(copied):
            return False
        if id(value) in seen:
            return True
        seen.add(id(value))
        if isinstance(value, dict):
            keys = list(value) == list(copied)
            return keys and all(self._same(v, copied[k], seen) for k, v in value.items())
        if isinstance(value, (list, tuple, collections.deque)):
            return len(value) == len(copied) and all(self._same(a, b, seen) for a, b in zip(value, copied, strict=True))
        if isinstance(value, set):
            return value == copied
        if is_object(value):
            return self._same(vars(value), vars(copied), seen)
        return False
