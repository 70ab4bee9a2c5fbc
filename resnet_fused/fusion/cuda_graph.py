"""Replays a whole model as one CUDA graph per kind of input, so that the host launches once instead of once a kernel.

A model that can't be captured, and every call that a replay would answer wrongly, runs as it did before.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from resnet_fused import config
from resnet_fused.backends import choice, tuning_cache
from resnet_fused.backends.binding import overridden
from resnet_fused.fusion.guards import versions
from resnet_fused.runtime.capture import Captured, overlaps
from resnet_fused.runtime.kept import Look
from resnet_fused.runtime.replay import current_settings

# The device that graphs are captured on, and the most graphs that a model keeps; the least recently used one goes.
DEVICE = "cuda"
MOST_GRAPHS = 16
_MOST_COUNTED = 1024
# Calls of a kind before it is captured; twice as many after each graph that had to go, up to the other number.
_CALLS, _MOST_NEEDED = 2, 1 << 20


class CudaGraphed(nn.Module):
    """A model for inference whose calls are replays of captured CUDA graphs.

    The first call with a kind of input (shapes, strides, types, settings) runs the model as it is, the second one
    captures it, and later ones copy the input into the graph's own, replay, and return copies of its results. The
    model runs as it is where a replay could differ or isn't possible: a derivative is asked for, in training mode,
    with hooks, under torch.compile, with tensors elsewhere than on one GPU, where it changes its input in place or launches
    nothing, or where capture failed before. Where more kinds of input come in turn than it keeps graphs, it captures less and
    less often. When a
    parameter or buffer changed, all is captured again. Its state dict is the model's.

    Args:
        model: the model; it remains usable by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._reset()
        self.train(model.training)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] = ()
        self._look: _Look | None = None
        self._needed = _CALLS
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._calls: Counter[Any] = Counter()
        self._refused: set[Any] = set()

    def extra_repr(self) -> str:
        return f"graphs={len(self._graphs)}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the model offers beside its forward, such as a classifier to look at.
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_state", "_look", "_needed", "_graphs", "_calls", "_refused")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    # Checkpoints have the model's own keys, without "model." in front.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As a part of another module, which loads its children's keys by their names.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, structure)
        if key is None:
            return self.model(*args, **kwargs)
        with self._lock:
            graph = self._graph(key, leaves, structure)
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph(leaves)
        return self.model(*args, **kwargs)

    def _key(self, leaves: list[Any], structure: Any) -> Any:
        """What a graph holds for; None where the call can't be a replay."""
        if self.training or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or overridden():
            return None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(type(t) is not Tensor or t.device.type != DEVICE for t in tensors):
            return None
        if len({t.device for t in tensors}) != 1 or _capturing() or any(map(overlaps, tensors)):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.model.parameters())):
            return None
        described = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        key = (described, structure, *_settings())
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _graph(self, key: Any, leaves: list[Any], structure: Any) -> _Graph | None:
        """The graph for a call, captured if this is the second one; None if the model must run as it is."""
        if not self._as_it_was():
            return None
        graph = self._graphs.get(key)
        if graph is not None or key in self._refused:
            return graph
        if len(self._calls) > _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        if self._calls[key] < self._needed:
            return None
        del self._calls[key]
        if len(self._graphs) >= MOST_GRAPHS:
            # More kinds of input than graphs: a capture takes as long as many calls, and this one may go before it has paid.
            self._needed = min(2 * self._needed, _MOST_NEEDED)
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)

        def run(leaves: list[Any]) -> Any:
            args, kwargs = _pytree.tree_unflatten(leaves, structure)
            return self.model(*args, **kwargs)

        try:
            graph = self._graphs[key] = _Graph(run, leaves)
        except Exception as error:
            self._refused.add(key)
            config.logger().warning(
                "%s can't be captured as a CUDA graph and runs without: %s: %s",
                type(self.model).__name__,
                type(error).__name__,
                error,
            )
        return graph

    def _as_it_was(self) -> bool:
        """Drops what was captured of another state. False where a replay would leave something out."""
        if self._look is not None and self._look.unchanged():
            return True
        self._look, state = None, state_of(self.model)
        if state is None:
            return False
        if state != self._state:
            self._graphs.clear()
            self._calls.clear()
            self._refused.clear()
            self._state, self._needed = state, _CALLS
        self._look = _Look(self.model)
        return True


def state_of(model: nn.Module) -> tuple[Any, ...] | None:
    """Modules, and addresses and versions of their tensors; None where a replay would leave something out."""
    if _hooks_everywhere():
        return None
    state: list[Any] = []
    for module in model.modules():
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        state.append(module)  # is equal to itself alone, and another one may have no tensors
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.is_inference():
                    # Doesn't count its changes.
                    return None
                state += (tensor.data_ptr(), tensor._version)
    return tuple(state)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _settings() -> tuple[Any, ...]:
    """Settings that kernels are chosen by, beside the input."""
    return (
        choice(),
        tuning_cache.generation(),
        torch.is_inference_mode_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        *current_settings(DEVICE),
    )


class _Graph:
    """One captured run, and its results' structure."""

    def __init__(self, run: Callable[[list[Any]], Any], leaves: list[Any]) -> None:
        self._captured = Captured(run, leaves)
        self._outputs, self._structure = _pytree.tree_flatten(self._captured.values)

    def __call__(self, leaves: list[Any]) -> Any:
        with self._captured.replayed(leaves):
            results = [out.clone() if isinstance(out, Tensor) else out for out in self._outputs]
        return _pytree.tree_unflatten(results, self._structure)


class _Look:
    """Whether a model without hooks, none of whose modules is in training, is as it was when the look was made.

    This stands before every replay, so it is flat and loops in C: versions of dicts, versions and addresses of tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        contents = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._dicts: list[dict[Any, Any]] = [*(vars(m) for m in modules), *(d for d in contents if d)]
        hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._empty = [*hooks, *(d for d in contents if not d)]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self._versions, self._values = versions(self._dicts), Look(tensors)

    def unchanged(self) -> bool:
        return (
            self._versions is not None
            and not any(self._empty)
            and not _hooks_everywhere()
            and versions(self._dicts) == self._versions
            and self._values.unchanged()
        )


def _hooks_everywhere() -> bool:
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
