"""Records what a module's forward does as a graph: calls of layers, functions and methods, through all modules in it.

The forward runs in a sandbox (`sandbox.py`) on stand-ins for its tensors, under a screen (`screening.py`) that ends the trace
before anything has an effect. Layers of PyTorch's own, and modules whose forward can't be traced, are one call each.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import itertools
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TracerBase
from torch.overrides import TorchFunctionMode

from resnet_fused.fusion.sandbox import HOOKS, Sandbox, is_immutable, is_own
from resnet_fused.fusion.screening import CannotTrace, Screen, Watched
from resnet_fused.runtime.folding import CONVOLUTIONS, NORMS, is_norm

# What may be asked of a parameter while tracing: it doesn't change without the parameter.
_METADATA = (
    *("shape", "size", "dim", "ndim", "dtype", "device", "numel", "is_cuda", "is_floating_point", "is_complex", "layout"),
    *("is_meta", "requires_grad", "__len__", "is_sparse", "is_quantized", "nelement", "itemsize", "element_size"),
)
_TENSOR_NAMES = frozenset(dir(Tensor))
_FUNCTIONS_WITH_DIMS_OF_INPUT = (
    *("conv1d", "conv2d", "conv3d", "batch_norm", "relu", "relu_", "add", "iadd", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "silu", "hardswish", "mul"),
)
_WITH_DIMS_OF_INPUT = (*CONVOLUTIONS, *NORMS, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d)


def own_forward(module: nn.Module, name: str = "plain_forward") -> Callable[..., Any]:
    """The forward that a module has without the library: of its class, or its own.

    Args:
        module: the module.
        name: of the method that stands for forward in the library's own blocks, whose forward takes the fast path itself.
    """
    forward = vars(module).get("forward")
    if forward is not None and not is_own(forward):
        return forward
    return forward.previous if forward is not None and forward.previous is not None else class_forward(module, name)


def class_forward(module: nn.Module, name: str) -> Callable[..., Any]:
    """The forward of a module's class; `name` as in `own_forward`."""
    kind = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return types.MethodType(vars(kind).get(name, vars(kind)["forward"]), module)


def has_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in HOOKS)


def is_layer(module: nn.Module) -> bool:
    """Whether a call of the module is one node: a layer of PyTorch's own, or a batch norm that is known by its name."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return False
    return type(module).__module__.startswith("torch.") or is_norm(module) or isinstance(module, torch.jit.ScriptModule)


@dataclass
class Trace:
    """What a forward does.

    Attributes:
        graph: its nodes; `call_module` and `get_attr` nodes are named by paths inside of the module.
        inlined: paths of the modules whose forward was traced through, the module itself ("") first.
        opaque: paths of modules that are called as a whole though they are no layers, and why.
        watched: global names that must keep their values.
        names: of all attributes that the traced code asks for.
        structure: the result, with fx nodes in the place of tensors.
        arguments: names of forward's arguments that are tensors.
        dims: how many dimensions forward was told that some of them have.
    """

    graph: fx.Graph
    inlined: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    watched: list[Watched] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    structure: Any = None
    arguments: tuple[str, ...] = ()
    dims: dict[str, int] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """A stand-in for a tensor, with a tensor's attributes and no others."""

    def __getattr__(self, name: str) -> Any:
        if name not in _TENSOR_NAMES:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name == "ndim":
            return self.dim()
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise CannotTrace(f"assigns the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def dim(self) -> Any:
        dims = self.tracer.dims_of(self.node)  # type: ignore[attr-defined]
        return _Attribute(self, "dim")() if dims is None else dims

    def numel(self) -> Any:
        if self.tracer.dims_of(self.node) is None:  # type: ignore[attr-defined]
            return _Attribute(self, "numel")()
        return _Count(self.tracer.create_node("call_method", "numel", (self.node,), {}), self.tracer)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise CannotTrace("writes into elements of a tensor")

    def __bool__(self) -> bool:
        raise CannotTrace("branches on a tensor's values or size")

    def __iter__(self) -> Any:
        # `n, c, h, w = x.shape` says how many there must be; a loop doesn't.
        frame = sys._getframe(1)
        caller = next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)
        if caller.opname != "UNPACK_SEQUENCE":
            raise CannotTrace("iterates over a tensor")
        return iter([self[i] for i in range(caller.argval)])  # type: ignore[index]

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    # fx's own stand-ins have none of these, so that `x += y` would look like `x = x + y`.
    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Attribute(_Proxy, Attribute):
    """An attribute of a stand-in, or a method of it that is about to be called."""

    __init__ = Attribute.__init__
    node = Attribute.node
    __call__ = Attribute.__call__


class _Count(_Proxy):
    """A number of elements. Programs serve tensors that have some."""

    def __eq__(self, other: object) -> Any:
        return False if other == 0 else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return True if other == 0 else super().__ne__(other)

    def __gt__(self, other: Any) -> Any:
        return True if other == 0 else super().__gt__(other)  # type: ignore[misc]

    __hash__ = object.__hash__


class _NoArithmetic(TorchFunctionMode):
    """Ends the trace where a forward computes with anything but its stand-ins: the recording would freeze the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in _METADATA or name in ("_assert", "is_tensor", "is_storage", "compile") or not isinstance(name, str):
            return func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            raise CannotTrace(f"computes with its parameters by itself ({name})")
        raise CannotTrace(f"makes a tensor or asks PyTorch by itself ({name})")


class Tracer(TracerBase):
    def __init__(self, module: nn.Module, opaque: dict[str, str]) -> None:
        self.trace = Trace(fx.Graph(), opaque=dict(opaque))
        self.graph = self.trace.graph
        self.module = module
        self.sandbox = Sandbox(module)
        self.paths = {id(self.sandbox.shadow(m)): path for path, m in module.named_modules()}
        self.tensors: dict[int, str] = {}
        for path, owner in module.named_modules():
            for name, tensor in itertools.chain(owner._parameters.items(), owner._buffers.items()):
                if tensor is not None:
                    self.tensors.setdefault(id(tensor), f"{path}.{name}" if path else name)
        convolution = next((m for m in module.modules() if isinstance(m, CONVOLUTIONS)), None)
        self.dims = 4 if convolution is None else convolution.weight.dim()
        self.mode = self._mode()
        for original, shadow in self.sandbox.shadows():
            vars(shadow)["forward"] = self._recorder(original, shadow)

    @staticmethod
    def _mode() -> tuple[bool, ...]:
        return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), torch.is_inference_mode_enabled()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None) -> fx.Node:
        if self._mode() != self.mode:
            raise CannotTrace("switches autograd or autocast")
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            path = self.tensors.get(id(a))
            if path is None:
                raise CannotTrace("uses a tensor that is no parameter or buffer")
            return self.create_node("get_attr", path, (), {})
        # fx would make plain containers of them.
        if (isinstance(a, dict) and type(a) is not dict) or (isinstance(a, list) and type(a) is not list):
            raise CannotTrace(f"passes {type(a).__name__} as an argument")
        if isinstance(a, nn.Module) or callable(a) or (dataclasses.is_dataclass(a) and not isinstance(a, tuple)):
            raise CannotTrace(f"passes {type(a).__name__} as an argument")
        return super().create_arg(a)

    def dims_of(self, node: fx.Node) -> int | None:
        """How many dimensions a tensor has, where that is known; of an argument it is told, and noted as told."""
        if node.op == "placeholder":
            return self.trace.dims.setdefault(str(node.target), self.dims)
        if node.op == "get_attr":
            tensor: Tensor = operator.attrgetter(str(node.target))(self.module)
            return tensor.dim()
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module":
            called = self.module.get_submodule(name)
            keeps = isinstance(called, _WITH_DIMS_OF_INPUT) or is_norm(called)
        else:
            keeps = name in _FUNCTIONS_WITH_DIMS_OF_INPUT
        if not keeps or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        # A sum or product has the dimensions of the operand that has the most of them; a convolution those of its input.
        operands = node.args[:2] if name in ("add", "iadd", "mul") else node.args[:1]
        dims = [self.dims_of(operand) for operand in operands if isinstance(operand, fx.Node)]
        return None if None in dims else max(dims)  # type: ignore[type-var]

    def _recorder(self, original: nn.Module, shadow: Any) -> Callable[..., Any]:
        """The forward of a shadow: traced through, or one call."""
        path = self.paths.get(id(shadow))
        if path is None:

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise CannotTrace(f"calls a {type(original).__name__} that isn't registered as a part of the model")

            return refuse

        def call_whole(args: Any, kwargs: Any) -> Any:
            return self.create_proxy("call_module", path, args, kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if path and (is_layer(original) or path in self.trace.opaque):
                return call_whole(args, kwargs)
            last = next(iter(reversed(self.graph.nodes)), None)
            inlined = len(self.trace.inlined)
            self.trace.inlined.append(path)
            try:
                function = own_forward(original)
                if not isinstance(function, types.MethodType) or function.__self__ is not original:
                    raise CannotTrace("is a function that was put into the module")
                result = function.__func__(shadow, *args, **kwargs)
                return result
            except (Exception, CannotTrace) as error:
                reason = _reason(original, error)
                if not path or _holds_containers(args, kwargs):
                    raise CannotTrace(reason) from error
                # Not traced through, but called as a whole: what was recorded of it is taken back.
                del self.trace.inlined[inlined:]
                while (node := next(iter(reversed(self.graph.nodes)), None)) is not last and node is not None:
                    self.graph.erase_node(node)
                self.trace.opaque[path] = reason
                return call_whole(args, kwargs)

        return forward

    def run(self) -> Trace:
        trace, module = self.trace, self.module
        function = own_forward(module)
        names, defaults = _arguments(module, function)
        trace.arguments = tuple(names)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        screen = Screen()
        try:
            # Under the mode, PyTorch's functions tell of themselves; the screen sees all others.
            with _NoArithmetic(), screen.active():
                result = self.sandbox.root.forward(*proxies, **defaults)
        finally:
            trace.watched, trace.names = screen.watched, screen.names
        self.results: list[fx.Node] = []
        trace.structure = self._structure(result)
        self.graph.output(tuple(self.results))
        # A size that was only asked for is no reader.
        for node in reversed(self.graph.nodes):
            if not node.users and node.op == "call_method" and node.target in _METADATA:
                self.graph.erase_node(node)
        return trace

    def _structure(self, value: Any) -> Any:
        """The result with nodes in the place of stand-ins."""
        if issubclass(type(value), fx.Proxy):
            self.results.append(value.node)
            return value.node
        if is_immutable(value) and type(value) is not tuple:
            return value
        if self.sandbox.holds(value):
            raise CannotTrace(f"forward of {type(self.module).__name__} returns a {type(value).__name__} that it keeps")
        if isinstance(value, tuple):
            items = [self._structure(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if type(value) is list:
            return [self._structure(item) for item in value]
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._structure(item)) for key, item in value.items())
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):
            for name, item in vars(value).items():
                object.__setattr__(value, name, self._structure(item))
            return value
        raise CannotTrace(f"forward of {type(self.module).__name__} returns a {type(value).__name__}")


def _arguments(module: nn.Module, function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Names of the arguments that must be given, and the values of those that needn't."""
    names, defaults = [], {}
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.default is p.empty:
            if p.kind is p.KEYWORD_ONLY:
                raise CannotTrace(f"forward of {type(module).__name__} has the keyword argument {p.name!r}")
            names.append(p.name)
        elif is_immutable(p.default):
            defaults[p.name] = p.default
        else:
            raise CannotTrace(f"forward of {type(module).__name__} has the optional argument {p.name!r}, which may change")
    if not names:
        raise CannotTrace(f"forward of {type(module).__name__} has no argument that must be given")
    return names, {name: value for name, value in defaults.items() if name}


def _holds_containers(args: Any, kwargs: Any) -> bool:
    """Whether a call passes something that the callee may have changed before it failed."""
    return any(isinstance(a, (list, dict, set)) for a in (*args, *kwargs.values()))


def _reason(module: nn.Module, error: BaseException) -> str:
    """Why a forward can't be traced, as the report prints it."""
    message = str(error).strip().splitlines()
    text = message[0] if message else type(error).__name__
    if isinstance(error, CannotTrace):
        return text if text.startswith("forward of ") else f"forward of {type(module).__name__} {text}"
    return f"forward of {type(module).__name__} can't be traced: {text}"


def trace(module: nn.Module) -> Trace:
    """What the module's forward does, with its layers, and what can't be traced through, as calls of a whole.

    Raises:
        CannotTrace: the module's own forward can't be traced; the message is the reason.
    """
    if torch.nn.modules.module._has_any_global_hook():
        raise CannotTrace("hooks for all modules are registered")
    opaque = {p: f"{type(m).__name__} has hooks" for p, m in module.named_modules() if p and has_hooks(m)}
    # A module that its own forward changes, which is seen only afterwards, is called as a whole at the next attempt.
    for _ in range(1 + sum(1 for _ in module.modules())):
        tracer = Tracer(module, opaque)
        found = tracer.run()
        changing = [(p, tracer.sandbox.changed(module.get_submodule(p))) for p in dict.fromkeys(found.inlined)]
        changed = {p: f"forward of {_kind(module, p)} changes its attribute {name!r}" for p, name in changing if name}
        if "" in changed:
            raise CannotTrace(changed[""])
        if not changed:
            return found
        opaque |= changed
    raise AssertionError("a trace with every module called as a whole changes nothing")


def _kind(module: nn.Module, path: str) -> str:
    return type(module.get_submodule(path)).__name__
