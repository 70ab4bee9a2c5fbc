"""What torch.utils.flop_counter counts for our operators: what it counts for the stock ones that they stand for.

Its module imports Triton, and so isn't imported here. Formulas are registered when someone else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

_COUNTER = "torch.utils.flop_counter"
_stock: dict[str, Callable[..., Any]] = {}


def count_as(name: str, stock: Callable[..., Any]) -> None:
    """Has resnet_fused::`name` counted as `stock`, a function of the same arguments in stock's operators."""
    _stock[name] = stock
    if _COUNTER in sys.modules:
        _register(name)


def _register(name: str) -> None:
    counter, stock = sys.modules[_COUNTER], _stock[name]

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs = _pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), (args, kwargs))
        with torch.no_grad(), counter.FlopCounterMode(display=False) as counted:
            stock(*args, **kwargs)
        return counted.get_total_flops()

    counter.register_flop_formula(getattr(torch.ops.resnet_fused, name), get_raw=True)(flops)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter's module as it is found without this one, and registers the formulas once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            sys.meta_path.remove(self)
            for own in _stock:
                _register(own)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
