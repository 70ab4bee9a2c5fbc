"""Whether a module is as it was when its forward was traced: its submodules, their attributes and hooks, names that code reads.

That is asked before every call, when nothing of the model is in the caches. So dictionaries are first compared by the version
that Python, or PyTorch for newer Pythons, keeps for each of them, and looked into only when that has changed. Hooks are looked
at only when the process has registered any since.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resnet_fused.fusion.sandbox import HOOKS, class_containers, is_immutable, is_object, is_own
from resnet_fused.fusion.screening import Watched
from resnet_fused.fusion.tracing import Trace, has_hooks

_STANDARD = frozenset(vars(nn.Module()))


def _find_dict_version() -> Callable[[dict[str, Any]], int] | None:
    """PyTorch's function that tells the version of a dict, which its own guards use; None where there is none."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, "dict_version", None)


_dict_version = _find_dict_version()


def versions(dicts: list[dict[Any, Any]]) -> list[int] | None:
    """A number for each dict that changes with it; None where Python and PyTorch keep none."""
    return None if _dict_version is None else [*map(_dict_version, dicts)]


class Structure:
    """What a program relies on beside the values of parameters.

    Args:
        module: the module whose forward was traced.
        trace: what came of it.
        absorbed: paths of all modules whose own call the program replaces, itself first.
    """

    def __init__(self, module: nn.Module, trace: Trace, absorbed: list[str]) -> None:
        replaced = [module.get_submodule(path) for path in absorbed]
        # The module's own hooks have been called before its forward is.
        inner = [m for m in module.modules() if m is not module]
        self._hooked = [m for m in inner if has_hooks(m)]
        self._hooks = [vars(m)[name] for m in inner if not has_hooks(m) for name in HOOKS]
        self._watched = [w for w in trace.watched if not is_constant_name(w)]
        self._forwards = [(kind, kind.forward) for kind in {type(m) for m in replaced}]
        self._dicts: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        inlined = {*trace.inlined}
        called = {str(node.target) for node in trace.graph.nodes if node.op == "call_module"}
        # One that has hooks may be looped over, and not called.
        wholes = trace.opaque.keys() & called
        read = {*absorbed, *called} - wholes
        for path, m in module.named_modules():
            if path not in read and any(path == whole or path.startswith(f"{whole}.") for whole in wholes):
                if any(other.startswith(f"{path}.") for other in read):
                    self._dicts.append(m._modules)
                # It may change itself when it is called; what the traced code reads of it must stay.
                own = vars(m)
                self._attributes += [(own, name, own[name]) for name in trace.names & own.keys()]
                continue
            self._dicts += (vars(m), m._parameters, m._buffers)
            if m._modules:
                self._dicts.append(m._modules)
            if path in inlined:
                self._watch_containers(m)
                classes: list[Any] = [vars(b) for b in type(m).__mro__ if not b.__module__.startswith(("torch.", "builtins"))]
                # Those too that a class inherits: it may be given one of its own.
                names = trace.names & {name for held in classes for name in held}
                self._attributes += [(held, name, held.get(name)) for held in classes for name in names]
        self._versions = versions(self._dicts)
        self._handles = RemovableHandle.next_id
        self._values, self._elements = self._look(), self._look_into_sequences()

    def _watch_containers(self, module: nn.Module) -> None:
        """Adds the lists, dicts and objects that a module holds as attributes, and what is in them."""
        seen: set[int] = set()
        held = [value for name, value in vars(module).items() if name not in _STANDARD and name != "forward"]
        held += class_containers(type(module)).values()
        while held:
            value = held.pop()
            if is_immutable(value) or isinstance(value, (Tensor, nn.Module)) or is_own(value) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                self._dicts.append(value)
                held += value.values()
            elif isinstance(value, (list, tuple, set, frozenset, deque)):
                self._sequences.append(value)
                held += value
            elif is_object(value):
                self._dicts.append(vars(value))
                held += vars(value).values()

    def _look(self) -> list[Any]:
        """All that the watched dicts hold now."""
        return [*itertools.chain.from_iterable(map(dict.values, self._dicts)), *map(len, self._dicts)]

    def _look_into_sequences(self) -> list[Any]:
        """All that the watched sequences hold now, which have no versions. They are few and short."""
        return [*itertools.chain.from_iterable(self._sequences), *map(len, self._sequences)]

    def fault(self) -> str | None:
        """What has changed; None if nothing has."""
        if RemovableHandle.next_id != self._handles:
            if any(self._hooks):
                return "a module has other hooks than before"
            self._handles = RemovableHandle.next_id
        if not all(map(has_hooks, self._hooked)):
            return "hooks were removed"
        if torch.nn.modules.module._has_any_global_hook():
            return "hooks for all modules are registered"
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return f"another forward was put into the class {kind.__name__}"
        for names, name, value in self._watched:
            if names.get(name) is not value:
                return f"the global {name!r} has another value"
        for own, name, value in self._attributes:
            if own.get(name) is not value:
                return f"the attribute {name!r} of a module has another value"
        if self._sequences and not _same(self._look_into_sequences(), self._elements):
            return _REPLACED
        now = versions(self._dicts)
        return self._compare() if now is None or now != self._versions else None

    def _compare(self) -> str | None:
        now_versions, now = versions(self._dicts), self._look()
        if not _same(now, self._values):
            return _REPLACED
        self._versions = now_versions
        return None


_REPLACED = "a module, parameter or attribute was replaced"


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(_is, now, before))


def _is(a: Any, b: Any) -> bool:
    return a is b or (type(a) is int and type(b) is int and a == b)


def is_constant_name(watched: Watched) -> bool:
    """Whether a name is one of PyTorch's, Python's or a class's or function's, which nobody gives another value."""
    return isinstance(watched.value, type(torch)) or str(getattr(watched.value, "__module__", "")).startswith("torch")
