"""Records what a module's forward does as a graph: calls of layers, functions and methods, through all modules in it.

The forward runs in a sandbox (`sandbox.py`) on stand-ins for its tensors, under a screen (`screening.py`) that ends the trace
before anything has an effect. Layers of PyTorch's own, and modules whose forward can't be traced, are one call each.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode

from resnet_fused.fusion.dims import Dims
from resnet_fused.fusion.results import is_tensor
from resnet_fused.fusion.sandbox import HOOKS, Sandbox, is_immutable, is_own
from resnet_fused.fusion.screening import CannotTrace, Screen, Watched
from resnet_fused.fusion.shapes import UNKNOWN, Shapes, without_memory
from resnet_fused.fusion.stand_ins import StandIn
from resnet_fused.runtime.folding import CONVOLUTIONS, is_norm

# Functions that make tensors of numbers, none of them random.
_MAKING = frozenset(("arange", "zeros", "ones", "full", "linspace", "eye", "tensor"))
# Methods of parameters that write to them, or whose result Python itself uses.
_NOT_NOTED = frozenset(
    (
        *(
            "__bool__",
            "__int__",
            "__float__",
            "__complex__",
            "__index__",
            "__contains__",
            "__iter__",
            "__array__",
            "__format__",
        ),
        *("__repr__", "__set__", "__delete__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"),
        *("__ifloordiv__", "__imod__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "backward"),
        *("register_hook", "retain_grad", "__deepcopy__", "__reduce_ex__", "__setstate__"),
    )
)
# What may be asked of a parameter while tracing: it doesn't change without the parameter.
_METADATA = (
    *("shape", "size", "dim", "ndim", "dtype", "device", "numel", "is_cuda", "is_floating_point", "is_complex", "layout"),
    *("is_meta", "requires_grad", "__len__", "is_sparse", "is_quantized", "nelement", "itemsize", "element_size"),
)


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
    if isinstance(module, fx.GraphModule):
        return False  # whose class is PyTorch's, and whose forward is what someone traced
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
        assumes_batches: whether convolutions were taken to read batches where nothing says so.
        asked: paths of parameters and buffers whose shape, dtype or device the forward asked for.
        by_size: whether a module is called as a whole that asks for a tensor's size, so that it may be traced for one size.
    """

    graph: fx.Graph
    inlined: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    watched: list[Watched] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    structure: Any = None
    arguments: tuple[str, ...] = ()
    dims: dict[str, int] = field(default_factory=dict)
    assumes_batches: bool = False
    asked: set[str] = field(default_factory=set)
    by_size: bool = False


class _OwnArithmetic(TorchFunctionMode):
    """Notes down what a forward computes with its parameters alone, and the tensors that it makes: each call does it again.

    Ends the trace where that has an effect, or gives something else than a tensor.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own, name = func, getattr(func, "__name__", str(func))
        if self._tracer.finds_shapes:
            return func(*args, **kwargs)
        if name in _MAKING and kwargs.get("out") is None:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
            if name in ("T", "mT"):
                return self._tracer.create_proxy("call_function", getattr, (args[0], name), {})
            func = None
        if name == "requires_grad" and self._tracer.training:
            raise CannotTrace("asks whether a derivative may be asked for")
        if name in _METADATA:
            found = (self._tracer.tensors.get(id(leaf)) for leaf in leaves)
            self._tracer.trace.asked.update(path for path in found if path is not None)
        if name in _METADATA or name in ("_assert", "is_tensor", "is_storage", "compile") or not isinstance(name, str):
            return own(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise CannotTrace(f"makes a tensor or asks PyTorch by itself ({name})")
        writes = (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None or kwargs.get("inplace")
        # In training what is written is noted down too: a step is counted, say. Calls run in their order, once each.
        noted = self._tracer.training and kwargs.get("out") is None and not kwargs.get("inplace")
        if func is None or (writes and not noted) or name in _NOT_NOTED:
            raise CannotTrace(f"computes with its parameters by itself ({name})")
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._tracer.parameter, (args, kwargs))
        return fx.Proxy.__torch_function__(func, types, args, kwargs)


class Tracer(TracerBase):
    """Runs one trace.

    Args:
        module: whose forward is traced.
        opaque: paths of modules that are called as a whole, and why.
        inputs: of a trace for one size: tensors without memory in the place of forward's arguments.
        training: as `trace`'s.
    """

    def __init__(
        self, module: nn.Module, opaque: dict[str, str], inputs: Sequence[Tensor] | None = None, training: bool = False
    ) -> None:
        self.training = training
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
        self.dims = Dims(module, 4 if convolution is None else convolution.weight.dim())
        self.shapes = None if inputs is None else Shapes(module, inputs)
        self.screen = Screen(training)
        self.finds_shapes = False
        self.sizes_asked = 0
        self.mode = self._mode()
        for original, shadow in self.sandbox.shadows():
            vars(shadow)["forward"] = self._recorder(original, shadow)

    @staticmethod
    def _mode() -> tuple[bool, ...]:
        return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), torch.is_inference_mode_enabled()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return StandIn(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None) -> fx.Node:
        if self._mode() != self.mode:
            raise CannotTrace("switches autograd or autocast")
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            return self.parameter(a).node
        # fx would make plain containers of them.
        if (isinstance(a, dict) and type(a) is not dict) or (isinstance(a, list) and type(a) is not list):
            raise CannotTrace(f"passes {type(a).__name__} as an argument")
        if isinstance(a, nn.Module) or callable(a) or (dataclasses.is_dataclass(a) and not isinstance(a, tuple)):
            raise CannotTrace(f"passes {type(a).__name__} as an argument")
        return super().create_arg(a)

    def parameter(self, tensor: Tensor) -> fx.Proxy:
        """A stand-in for a parameter or buffer."""
        path = self.tensors.get(id(tensor))
        if path is None:
            raise CannotTrace("uses a tensor that is no parameter or buffer")
        return self.proxy(self.create_node("get_attr", path, (), {}))

    def dims_of(self, node: fx.Node) -> int | None:
        """How many dimensions a tensor has; None where that isn't known."""
        shape = self.shape_of(node)
        if shape is not None:
            return len(shape)
        return self.dims.of(node)

    def shape_of(self, node: fx.Node) -> torch.Size | None:
        """The shape of a tensor in a trace for one size; None where it isn't known."""
        if self.shapes is None:
            self.sizes_asked += 1
            return None
        value = self._value_of(node)
        return value.shape if isinstance(value, Tensor) else None

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether the value of a node is known to be a tensor."""
        if self.shapes is not None and (value := self._value_of(node)) is not UNKNOWN:
            return isinstance(value, Tensor)
        return is_tensor(self.module, node)

    def _value_of(self, node: fx.Node) -> Any:
        assert self.shapes is not None
        self.finds_shapes = True
        try:
            return self.shapes.value(node)
        finally:
            self.finds_shapes = False

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
            inlined, asked = len(self.trace.inlined), self.sizes_asked
            self.trace.inlined.append(path)
            try:
                function = own_forward(original)
                if not isinstance(function, types.MethodType) or function.__self__ is not original:
                    raise CannotTrace("is a function that was put into the module")
                result = function.__func__(shadow, *args, **kwargs)
                return result
            except (Exception, CannotTrace) as error:
                reason = _reason(original, error)
                by_size = self.sizes_asked > asked
                if not path or _holds_containers(args, kwargs):
                    reraised = CannotTrace(reason)
                    reraised.by_size = by_size
                    raise reraised from error
                self.trace.by_size |= by_size
                # Not traced through, but called as a whole: what was recorded of it is taken back.
                del self.trace.inlined[inlined:]
                while (node := next(iter(reversed(self.graph.nodes)), None)) is not last and node is not None:
                    self.graph.erase_node(node)
                self.trace.opaque[path] = reason + (", which the sizes of a call may tell" if by_size else "")
                return call_whole(args, kwargs)

        return forward

    def run(self) -> Trace:
        trace, module = self.trace, self.module
        function = own_forward(module)
        names, defaults = _arguments(module, function)
        trace.arguments = tuple(names)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        screen = self.screen
        try:
            # Under the mode, PyTorch's functions tell of themselves; the screen sees all others.
            with _OwnArithmetic(self), screen.active():
                result = self.sandbox.root.forward(*proxies, **defaults)
        finally:
            trace.watched, trace.names = screen.watched, screen.names
            trace.dims, trace.assumes_batches = self.dims.arguments, self.dims.assumed
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


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a forward must be given."""
    return tuple(_arguments(module, own_forward(module))[0])


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


def trace(module: nn.Module, inputs: Sequence[Tensor] | None = None, training: bool = False) -> Trace:
    """What the module's forward does, with its layers, and what can't be traced through, as calls of a whole.

    Args:
        module: the module.
        inputs: of a trace for one size, which holds for arguments of these shapes alone: the arguments.
        training: whether it is for calls that autograd watches. They are made with autograd, as it is; forwards of which the
            derivative isn't that of what they call can't be traced, and writes to buffers are calls like others.

    Raises:
        CannotTrace: the module's own forward can't be traced; the message is the reason.
    """
    if torch.nn.modules.module._has_any_global_hook():
        raise CannotTrace("hooks for all modules are registered")
    opaque = {p: f"{type(m).__name__} has hooks" for p, m in module.named_modules() if p and has_hooks(m)}
    if training:  # the library's own blocks, which have their own way to train
        blocks = {p: f"{type(m).__name__} trains by itself" for p, m in module.named_modules() if hasattr(m, "unfused_forward")}
        if "" in blocks:
            raise CannotTrace(blocks[""])
        opaque |= blocks
    if inputs is not None:
        inputs = [*map(without_memory, inputs)]
    # A module that its own forward changes, which is seen only afterwards, is called as a whole at the next attempt.
    for _ in range(1 + sum(1 for _ in module.modules())):
        tracer = Tracer(module, opaque, inputs, training)
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
