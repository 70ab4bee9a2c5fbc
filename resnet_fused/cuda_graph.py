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
from resnet_fused.backends import choice, records
from resnet_fused.backends.binding import serving

# The device that graphs are captured on, and the most graphs that a model keeps; the least recently used one goes.
_DEVICE = "cuda"
_MOST_GRAPHS = 16
_MOST_COUNTED = 1024


class CudaGraphed(nn.Module):
    """A model for inference whose calls are replays of captured CUDA graphs.

    The first call with a kind of input (shapes, strides, types, settings) runs the model as it is, the second one
    captures it, and later ones copy the input into the graph's own, replay, and return copies of its results. The
    model runs as it is where a replay could differ or isn't possible: a derivative is asked for, in training mode,
    with hooks, under torch.compile, with tensors elsewhere than on one GPU, or where capture failed before. When a
    parameter or buffer changed, all is captured anew. Its state dict is the model's.

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
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._calls: Counter[Any] = Counter()
        self._refused: set[Any] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the model offers beside its forward, such as a classifier to look at.
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_state", "_graphs", "_calls", "_refused")
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
        if self.training or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or serving():
            return None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(type(t) is not Tensor or t.device.type != _DEVICE for t in tensors):
            return None
        if len({t.device for t in tensors}) != 1 or _capturing() or any(map(_overlaps, tensors)):
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
        state = self._current_state()
        if state is None:
            return None
        if state != self._state:
            self._graphs.clear()
            self._calls.clear()
            self._refused.clear()
            self._state = state
        graph = self._graphs.get(key)
        if graph is not None or key in self._refused:
            return graph
        if len(self._calls) > _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        if self._calls[key] < 2:
            return None
        while len(self._graphs) >= _MOST_GRAPHS:
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

    def _current_state(self) -> tuple[Any, ...] | None:
        """Addresses and versions of all parameters and buffers; None where a replay would leave something out."""
        everywhere = torch.nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return None
        state: list[int] = []
        for module in self.model.modules():
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return None
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    if tensor.is_inference():
                        # Doesn't count its changes.
                        return None
                    state += (tensor.data_ptr(), tensor._version)
        return tuple(state)


def _overlaps(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor, whose strides a copy can't have."""
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _settings() -> tuple[Any, ...]:
    """Settings that kernels are chosen by, beside the input."""
    cudnn = torch.backends.cudnn
    return (
        choice(),
        records.generation(),
        torch.is_autocast_enabled(_DEVICE),
        torch.get_autocast_dtype(_DEVICE),
        torch.is_inference_mode_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


class _Graph:
    """One captured run: its own inputs, results and the graph between them."""

    def __init__(self, run: Callable[[list[Any]], Any], leaves: list[Any]) -> None:
        # Normal tensors, into which can be copied within inference mode and without.
        with torch.inference_mode(False):
            self.inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        with torch.cuda.device(self.device):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs, self.structure = _pytree.tree_flatten(run(self.inputs))
            self.stream = torch.cuda.current_stream()
            self.done = torch.cuda.Event()
            self.done.record(self.stream)

    def __call__(self, leaves: list[Any]) -> Any:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                # Another stream's call may still be at work on the graph's tensors.
                stream.wait_event(self.done)
                self.stream = stream
            for own, given in zip(self.inputs, leaves, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(given)
            self.graph.replay()
            results = [out.clone() if isinstance(out, Tensor) else out for out in self.outputs]
            self.done.record(stream)
        return _pytree.tree_unflatten(results, self.structure)
