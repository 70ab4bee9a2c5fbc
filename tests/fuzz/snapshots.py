"""What can be seen of values and models, flattened to named leaves, so that two runs can be compared leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor as it was when it was seen. `alias` and `same` name the first value with its storage, and with its identity."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    leaf: bool
    inference: bool
    value: Tensor
    alias: str = ""
    same: str = ""


Leaves = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that was seen at a step of a scenario."""

    step: int
    label: str
    leaves: Leaves


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The parts of a nested value: containers give their type, the rest is given as it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield path, f"{type(value).__name__} of {list(map(str, value))}"
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!s}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, f"dataclass {type(value).__name__}"
        for field in dataclasses.fields(value):
            yield from walk(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, torch.Size):
        yield path, f"Size{tuple(value)}"
    elif isinstance(value, (tuple, list)):
        yield path, f"{type(value).__name__} of {len(value)}"
        for i, item in enumerate(value):
            yield from walk(item, f"{path}[{i}]")
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        yield path, value
    elif isinstance(value, (set, frozenset)):
        yield path, f"{type(value).__name__} {sorted(map(str, value))}"
    else:
        yield path, f"a {type(value).__name__}"


class Aliases:
    """Names of tensors by identity and by storage, the first that was seen first."""

    def __init__(self) -> None:
        self._by_id: dict[int, str] = {}
        self._by_storage: dict[int, str] = {}

    def add(self, name: str, tensor: Tensor) -> tuple[str, str]:
        same = self._by_id.setdefault(id(tensor), name)
        try:
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):
            pointer = 0
        alias = self._by_storage.setdefault(pointer, name) if pointer else ""
        return same, alias


def tensor_leaf(tensor: Tensor, same: str = "", alias: str = "") -> TensorLeaf | str:
    try:
        with torch._C.DisableTorchFunctionSubclass():
            value = tensor.detach().clone().as_subclass(Tensor)
        return TensorLeaf(
            type(tensor).__name__,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.requires_grad,
            tensor.is_leaf,
            tensor.is_inference(),
            value,
            alias,
            same,
        )
    except (RuntimeError, NotImplementedError):  # left over from a transform that has ended
        return "a tensor that can't be read"


def flatten(value: Any, path: str, aliases: Aliases | None = None) -> Leaves:
    leaves: Leaves = {}
    for name, part in walk(value, path):
        if isinstance(part, Tensor):
            same, alias = aliases.add(name, part) if aliases is not None else ("", "")
            leaves[name] = tensor_leaf(part, same, alias)
        else:
            leaves[name] = part
    return leaves


# `training` is compared with the module's type; `extra_repr` marks a fused model in its repr.
_NOT_COMPARED = ("training", "forward", "extra_repr")


def state(model: nn.Module) -> Leaves:
    """Everything public of a model: its modules, their types, modes, hooks, attributes, parameters and buffers."""
    leaves: Leaves = {}
    first: dict[int, str] = {}
    aliases = Aliases()
    for path, module in model.named_modules(remove_duplicate=False):
        at = f"model.{path}" if path else "model"
        if id(module) in first:
            leaves[at] = f"is {first[id(module)]}"
            continue
        first[id(module)] = at
        leaves[at] = f"{type(module).__name__} in {'training' if module.training else 'eval'}"
        leaves[f"{at} hooks"] = {name: len(hooks) for name in HOOKS if (hooks := getattr(module, name, None))}
        leaves[f"{at} buffers"] = f"{list(module._buffers)} {sorted(module._non_persistent_buffers_set)}"
        leaves[f"{at} parameters"] = f"{list(module._parameters)}"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                leaves[f"{at}.{name}"] = None
            else:
                found = flatten(tensor, f"{at}.{name}", aliases)
                # rf.fuse makes copies that count their changes, even under inference_mode.
                leaves |= {k: replace(v, inference=False) if isinstance(v, TensorLeaf) else v for k, v in found.items()}
        # A changed `forward` is how a fused model may do its work; what it computes is compared, not where it stands.
        public = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _NOT_COMPARED}
        leaves[f"{at} attributes"] = f"{sorted(public)}"
        for name, value in public.items():
            leaves |= flatten(value, f"{at}.{name}", aliases)
    leaves["state_dict"] = f"{list(model.state_dict())}"
    return leaves


def modes() -> Leaves:
    """Global settings of PyTorch that nothing here is to change."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
