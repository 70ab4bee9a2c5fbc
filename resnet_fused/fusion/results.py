"""What is known of the result of a node in a trace before it runs: whether it is a tensor, and in memory of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# Layers of these files give a tensor.
_GIVE_TENSORS = (
    *("activation", "batchnorm", "channelshuffle", "conv", "dropout", "flatten", "fold", "instancenorm", "linear"),
    *("normalization", "padding", "pixelshuffle", "pooling", "sparse", "upsampling"),
)
# In Python's names, where PyTorch has others.
_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "getitem": "select"}
# Functions and methods whose result shares no memory with what they read, whatever their arguments are.
_NEW = frozenset(
    (
        *(
            "add",
            "sub",
            "mul",
            "div",
            "truediv",
            "neg",
            "pow",
            "cat",
            "concat",
            "stack",
            "clone",
            "matmul",
            "bmm",
            "mm",
            "einsum",
        ),
        *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "softmax"),
        *("sigmoid", "tanh", "gelu", "silu", "relu", "relu6", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "clamp"),
        *("mean", "sum", "sqrt", "rsqrt", "exp", "avg_pool2d", "max_pool2d", "interpolate", "pad", "pixel_shuffle"),
    )
)


def name_of(node: fx.Node) -> str:
    """Name of the function, method or module that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_tensor(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's result is known to be a tensor. Programs are run on arguments that are."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        package, _, file = type(called).__module__.rpartition(".")
        if isinstance(called, nn.MultiheadAttention) or getattr(called, "return_indices", False):
            return False
        return package == "torch.nn.modules" and file in _GIVE_TENSORS
    if node.kwargs.get("return_indices") or node.kwargs.get("out") is not None:
        return False
    name = name_of(node)
    if node.op == "call_function":
        own = getattr(node.target, "__module__", None) == "_operator"
        if not own and node.target not in (getattr(torch, name, None), getattr(F, name, None)):
            return False
        if own and not any(isinstance(a, fx.Node) and is_tensor(module, a) for a in node.args):
            return False  # of numbers, say
        name = _OPERATORS.get(name, name) if own else name
    elif not isinstance(node.args[0], fx.Node) or not is_tensor(module, node.args[0]):
        return False
    return _gives_tensor(name)


@functools.cache
def _gives_tensor(name: str) -> bool:
    """Whether PyTorch's operator of a name gives one tensor wherever it takes one."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    own = [s for s in schemas if s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]")]
    return bool(own) and all([str(value.type) for value in s.returns] == ["Tensor"] for s in own)


def is_new(node: fx.Node) -> bool:
    """Whether the result of a function or method lies in memory that nothing else has."""
    return node.op in ("call_function", "call_method") and name_of(node) in _NEW and not writes(node)


_WRITING = ("iadd", "isub", "imul", "itruediv", "setitem", "__iadd__", "__setitem__")
_WITH_INPLACE = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"),
    *("dropout", "dropout2d", "threshold", "rrelu", "alpha_dropout"),
)


def writes(node: fx.Node) -> bool:
    """Whether a function or method may write to what it reads."""
    name = name_of(node)
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None or (name in _WITH_INPLACE and True in node.args[1:]):
        return True
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


_RANDOM = ("dropout", "rand", "bernoulli", "normal", "uniform", "multinomial", "poisson", "exponential", "geometric", "cauchy")
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training")


def is_repeatable(node: fx.Node) -> bool:
    """Whether nobody notices if a function or method is called twice: it draws no random numbers, and moves no statistics."""
    name = name_of(node)
    given: dict[str, Any] = {**dict(zip(_NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    if node.target in (F.batch_norm, F.instance_norm) and given.get("running_mean") is given.get("running_var") is None:
        return True
    if name in ("batch_norm", "instance_norm"):
        # The sixth argument has this meaning in every form of them. An instance norm takes its input's statistics by itself.
        return given.get("training", name != "batch_norm") is False
    return not any(word in name for word in _RANDOM) or node.kwargs.get("training") is False
