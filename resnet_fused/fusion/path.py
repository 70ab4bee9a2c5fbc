"""The fast path at a module's forward: fused kernels where everything is as it was when the forward was traced.

A fast path stands in the instance's attribute `forward`. A call that its guards hold for runs the program of kernels; every
other call runs the module's own forward, in which the fast paths of its children still serve.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import config
from resnet_fused.backends import choice
from resnet_fused.fusion.layers import get
from resnet_fused.fusion.traces import Traced, Traces
from resnet_fused.fusion.tracing import class_forward, own_forward
from resnet_fused.fusion.training import TrainingTraces
from resnet_fused.runtime.calls import autocast_dtype, plain
from resnet_fused.runtime.executor import Settings, settle
from resnet_fused.runtime.kept import ByKind, Unservable
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.program import Call
from resnet_fused.runtime.released import release
from resnet_fused.runtime.run import Run

_STOCK: Any = object()  # what `_serve` gives where the module's own forward must run
_requires_grad = operator.attrgetter("requires_grad")
# Calls in a row whose values were left to stock's arithmetic, after which the path computes directly, without Winograd.
_MOST_DECLINED = 8
_CALLS_BEFORE_WARNING = 10
# Kinds of input that may become CUDA graphs, each with memory of its own.
_MOST_GRAPHS = 8

# Who calls a module's forward, with the module as `self`.
_MODULE_CALLS = (nn.Module._call_impl.__code__, nn.Module._slow_forward.__code__)

_off: ContextVar[bool] = ContextVar("resnet_fused_paths_off", default=False)


@contextmanager
def paths_off() -> Iterator[None]:
    """Within the `with` block, modules of this thread run their own forwards."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


class Fusion:
    """What the fast paths of one model share.

    Args:
        settings: as `rf.fuse` was given them.
        inference: whether programs of kernels serve calls in inference (`rf.fuse`).
        training: whether batch norms are fused where a derivative may be asked for (`rf.fuse_training`).

    Attributes:
        parameters: folded and packed parameters of all its layers.
        rows: the report's, as of rf.fuse.
        served: how often a path served, the model's own or one inside of it.
        calls_served, calls_stock: calls of the model in which a path served, and in which none did.
        reason: why the last of the latter ran as stock.
    """

    def __init__(self, settings: Settings, inference: bool = True, training: bool = False) -> None:
        self.settings, self.inference, self.training = settings, inference, training
        self.parameters = Parameters()
        self.rows: list[Any] = []
        self.served = self.calls_served = self.calls_stock = 0
        self.reason = ""
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "inference": self.inference, "training": self.training, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"], state["inference"], state["training"])  # type: ignore[misc]
        self.rows = state["rows"]

    def count(self, served: bool, reason: str) -> None:
        """Notes a call of the model, and warns once where most run as stock."""
        if served:
            self.calls_served += 1
            return
        self.calls_stock += 1
        self.reason = reason
        if not self._warned and self.calls_stock > max(_CALLS_BEFORE_WARNING, self.calls_served):
            self._warned = True
            config.logger().warning(
                "a model fused by rf.fuse ran as stock in %d of %d calls: %s. See rf.report.",
                self.calls_stock,
                self.calls_stock + self.calls_served,
                reason,
            )


class FastPath:
    """The forward of a fused module.

    Args:
        module: the module.
        fusion: what it shares with the other paths of the model.
        root: whether it is the model that was fused.

    Attributes:
        previous: the module's own forward, where it had one that isn't of its class.
        traces: the programs of the module's forward.
        training: the training paths of the module, by its mode.
        reason: why the last call ran the module's own forward; "" if it didn't.
    """

    def __init__(self, module: nn.Module, fusion: Fusion, root: bool = False) -> None:
        self.module, self.fusion, self.root = module, fusion, root
        previous = vars(module).get("forward")
        # Not asked for its attribute: functools.update_wrapper gives a copy of it to what stands around a path.
        self.previous: Any = previous.previous if isinstance(previous, FastPath) else previous
        self._reset()

    def _reset(self) -> None:
        self.reason = "not called yet"
        self.removed = False
        self._settings = self.fusion.settings
        self.traces = Traces(self.module, self._settings)
        self.training = {mode: TrainingTraces(self.module) for mode in (True, False)}
        kind = next(base for base in type(self.module).__mro__ if "forward" in vars(base))
        self._by_parts = "unfused_forward" in vars(kind)

    def __reduce__(self) -> Any:
        # copy, deepcopy and pickle all come through here; what is kept is found again where it is needed.
        return _restore, (self.module, self.fusion, self.root, self.previous)

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The forward that the module has without this path."""
        return class_forward(self.module, "unfused_forward") if self.previous is None else self.previous

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For inspect.signature."""
        return self.own_forward

    @property
    def __code__(self) -> Any:
        """For torch.export, which asks a forward where it is written."""
        return self.own_forward.__code__

    def runs(self) -> list[Run]:
        """What served so far."""
        return [run for traced in self.traces for run in traced.runs.values()]

    def install(self) -> None:
        """Puts the path into the module."""
        own = vars(self.module)
        if self.previous is None and "_path" in own and own_forward(self.module).__name__ == "plain_forward":
            own["_path"] = self  # which one of the library's own blocks takes by itself
            return
        own["forward"] = self
        if self.root:
            own["extra_repr"] = self.extra_repr

    def remove(self) -> None:
        """Takes the path out of the module, and out of use where someone's own forward still calls it."""
        self.removed = True
        self.traces, self.training = Traces(self.module, self._settings), {}
        own = vars(self.module)
        if own.get("_path") is self:
            own["_path"] = None
        if own.get("forward") is self:
            del own["forward"]
            if self.previous is not None:
                own["forward"] = self.previous
        if getattr(own.get("extra_repr"), "__self__", None) is self:
            del own["extra_repr"]

    def extra_repr(self) -> str:
        own = type(self.module).extra_repr(self.module)
        rows = self.fusion.rows
        fused = [f"{sum(bool(row.op) for row in rows)} of {len(rows)} convolutions"] if self.fusion.inference else []
        mark = "fused by resnet_fused: " + ", ".join([*fused, *(["for training"] if self.fusion.training else [])])
        return f"{own}\n{mark}" if own else mark

    # ---- calls -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._in_graph(args, kwargs)
        caller = sys._getframe(1)
        if caller.f_code in _MODULE_CALLS:
            called = caller.f_locals["self"]
            if called is not self.module:
                # A shallow copy, such as a replica of nn.DataParallel's: it has the path, but not its module.
                return self._forward_of(called)(*args, **kwargs)
        if _off.get():  # the library's own comparisons, which the report doesn't count
            return self.own_forward(*args, **kwargs)
        if self.fusion.training and torch.is_grad_enabled():
            result = self._by_training(args, kwargs)
            if result is not _STOCK:
                return result
        if not self.root:
            result = self._by_program(args, kwargs)
            return self.own_forward(*args, **kwargs) if result is _STOCK else result
        served = self.fusion.served
        result = self._by_program(args, kwargs)
        if result is not _STOCK:
            self.fusion.calls_served += 1
            return result
        reason = self.reason
        result = self.own_forward(*args, **kwargs)
        if self.fusion.inference and not self._trains():
            self.fusion.count(self.fusion.served != served, reason)
        return result

    def _forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """The own forward of a shallow copy of the module."""
        own = self.own_forward
        return types.MethodType(own.__func__, module) if isinstance(own, types.MethodType) else own

    def _trains(self) -> bool:
        """Whether the module is in training mode, and its first layer too: nn.Sequential(*children) of a model in eval mode is
        in training mode itself. What other layers are the trace tells."""
        return self.module.training and next((m.training for m in self.module.modules() if not m._modules), True)

    def _not(self, reason: str) -> Any:
        self.reason = reason
        return _STOCK

    def _by_training(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result with fused batch norms, as autograd watches it, or `_STOCK`."""
        given = (*args, *kwargs.values())
        # Empty batches are served too: of processes that share statistics, each must do as the others do.
        if self.removed or any(not isinstance(x, Tensor) or x.layout is not torch.strided for x in given):
            return _STOCK
        if not self.module.training and not any(map(_requires_grad, (*given, *self.module.parameters()))):
            return _STOCK  # which is inference
        if not plain(*given):
            return _STOCK
        trained = self.training[self.module.training].current()
        if trained is None:
            return _STOCK
        arguments, dims = trained.trace.arguments, trained.trace.dims
        if kwargs or len(args) != len(arguments):
            bound = self._bind(args, kwargs, arguments)
            if bound is None:
                return _STOCK
            args = bound
        if any(dims.get(name, x.dim()) != x.dim() for name, x in zip(arguments, args, strict=True)):
            return _STOCK
        return trained(args)

    def _by_program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result by the program of kernels, or `_STOCK`."""
        if self._trains():
            return self._not("the module is in training mode; call model.eval()")
        if self.removed:
            return self._not("the fast path was taken out")
        if not self.fusion.inference:
            return self._not("it was fused for training alone; rf.fuse fuses it for inference")
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor):
                return self._not(f"an argument is {type(x).__name__}, not a tensor")
        traces, watched = self.traces, not plain(*args, *kwargs.values())
        traced = traces.of_size(args) if traces.by_size and not kwargs else None
        if traced is None or watched:
            traced = traces.of_any_size()
            if traced is None and (watched or not traces.by_size):
                return self._not(traces.untraceable)
            arguments = traces.arguments
            if kwargs or len(args) != len(arguments):
                bound = self._bind(args, kwargs, arguments)
                if bound is None:
                    return self._not(f"it was called in another way than with {', '.join(arguments)}")
                args = bound
            if watched:
                assert traced is not None
                if torch._C._is_tracing() and not torch.onnx.is_in_onnx_export():
                    return self._record(traced, args)
                return self._not("it is traced, transformed, or called with a subclass of Tensor")
            if traces.by_size:
                traced = traces.of_size(args) or traces.make_for_size(args) or traced
            if traced is None:
                return self._not(traces.untraceable)
        if torch.is_grad_enabled() and (any(map(_requires_grad, args)) or any(map(_requires_grad, traced.differentiable))):
            return self._not("a derivative may be asked for; call it under torch.no_grad() or torch.inference_mode()")
        runs = traced.runs  # taken before the look: what is settled below must not stand beside values that come later
        if not traced.look.unchanged():
            if not self._values_changed(traced):
                return self._not(traces.untraceable)
            runs = traced.runs
        key = self.kind_of(args)
        run = runs.get(key)
        try:
            if run is None:
                run, result = self.choose_run(traced, runs, key, args)
            else:
                result = run(args)
        except Unservable as reason:
            return self._not(str(reason))
        if run.unequal:
            traces.leave_sums({match.name for step in run.unequal for match in traced.built.groups[step].matches})
        if run.declined >= _MOST_DECLINED and self._settings.precision == "fast":
            self._settings = replace(self._settings, precision="direct")
            traced.runs = ByKind()
            config.logger().info("%s gets large values again and again; it is computed directly", type(self.module).__name__)
        self.fusion.served += 1
        self.reason = ""
        return result

    def kind_of(self, args: tuple[Any, ...]) -> Any:
        """What kernels are chosen by."""
        kinds = [(x.shape, x.stride(), x.dtype, x.device, x.layout) for x in args]
        dtype = autocast_dtype(args[0].device.type)
        settings = (choice(self._settings.backend), dtype, torch._C._get_mkldnn_enabled())
        return (*kinds, *settings, torch.get_num_threads())

    def choose_run(self, traced: Traced, runs: ByKind[Run], key: Any, args: tuple[Any, ...]) -> tuple[Run, Any]:
        """Runs the program for the first time on this kind of input."""
        for name, x in zip(traced.built.trace.arguments, args, strict=True):
            if x.numel() == 0 or traced.built.trace.dims.get(name, x.dim()) != x.dim() or x.layout is not torch.strided:
                raise Unservable("an input is empty, or has no batch, or no strides")
        settings = self._settings if len(runs) < _MOST_GRAPHS else replace(self._settings, replay=False)
        run, result = settle(traced.built.program, args, traced.tensors, self.fusion.parameters, settings, self.module)
        runs.put(key, run)
        return run, result

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...] | None:
        """The arguments by their places; None where others are given than those that the trace was made with."""
        signature = inspect.signature(self.own_forward)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return None
        if {*given} != {*names}:
            return None
        return tuple(given[name] for name in names)

    def _values_changed(self, traced: Traced) -> bool:
        try:
            same = traced.values_changed()
        except Unservable as reason:
            self.traces.untraceable = str(reason)
            return False
        if same:
            return True
        self.traces.forget()
        self.traces.untraceable = "its parameters have other shapes or dtypes than before; the next call serves them"
        return False

    def release(self) -> None:
        """Gives back the memory of the weights that were packed for the calls so far.

        Raises:
            ValueError: no call was served.
        """
        traced = next((traced for traced in self.traces if len(traced.runs)), None)
        if traced is None:
            raise ValueError(
                f"release=True found nothing to release, since no fused kernel runs the whole model: {self.reason}. "
                "Leave release out, and see rf.report."
            )
        built = traced.built
        fused = set.intersection(*(set(run.problems) for run in traced.runs.values()))
        matches = [match for number in fused & built.groups.keys() for match in built.groups[number].convolutions]
        read_otherwise = {item.target for item in built.program.items if isinstance(item, Call) and item.kind == "get_attr"}
        weights = {match.layer.weight for match in matches}
        for number, item in enumerate(built.program.items, built.program.inputs):
            if isinstance(item, Call) and item.fast and number in fused:
                weights.add(f"{item.target}.weight")
        for path in weights - read_otherwise - built.derived.keys():
            weight = get(self.module, path)
            if type(weight) is nn.Parameter:
                release(weight)
        traced.look_again()
        self.fusion.parameters.forget_released()

    # ---- graphs ------------------------------------------------------------------------------------------------------

    def _record(self, traced: Traced, args: tuple[Any, ...]) -> Any:
        """The program as registered operators, for torch.jit.trace."""
        if torch.is_grad_enabled() and (any(map(_requires_grad, args)) or any(map(_requires_grad, traced.differentiable))):
            return self._not("a derivative may be asked for")
        assert self.traces.graph is not None
        return self.traces.graph.run(self.module, args)

    def _in_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """For torch.compile and torch.export: the program as registered operators, or the module's own forward."""
        # Dynamo knows no context variables of this kind, and torch.export without it asks them.
        off = not torch.compiler.is_dynamo_compiling() and _off.get()
        graph = None if off else self.traces.graph
        if graph is not None and not kwargs and len(args) == graph.inputs and graph.holds_for(self.module, args):
            return graph.run(self.module, args)
        # As `own_forward`, in words that Dynamo knows.
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        forward = type(self.module).unfused_forward if self._by_parts else type(self.module).forward  # type: ignore[attr-defined]
        return forward(self.module, *args, **kwargs)


def _restore(module: nn.Module, fusion: Fusion, root: bool, previous: Any) -> FastPath:
    path = FastPath.__new__(FastPath)
    path.module, path.fusion, path.root, path.previous = module, fusion, root, previous
    path._reset()
    return path
