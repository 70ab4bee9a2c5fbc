"""How many dimensions the tensors of a trace have, where no sizes are known."""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn

from resnet_fused.fusion.results import name_of
from resnet_fused.runtime.folding import CONVOLUTIONS, is_norm

_ELEMENTWISE = ("relu", "relu_", "silu", "hardswish", "sigmoid", "gelu", "tanh", "clamp", "add", "iadd", "mul", "imul", "sub")
_KEEPING = (
    *_ELEMENTWISE,
    *("batch_norm", "bernoulli_", "div_"),
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_avg") for dims in (1, 2, 3)),
)
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full")
_CONCATENATIONS = ("cat", "concat", "concatenate")
_CONVOLUTIONS = {"conv1d": 3, "conv2d": 4, "conv3d": 5}
_KEEPING_FILES = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.pooling")
_NORMS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # which take no others


class Dims:
    """The dimensions of the tensors of one trace.

    Args:
        module: the traced module.
        told: how many are told of an argument.

    Attributes:
        arguments: by name, how many were told.
        assumed: whether a convolution was taken to read a batch where nothing says so, which its program must look at.
    """

    def __init__(self, module: nn.Module, told: int) -> None:
        self._module, self._told = module, told
        self._known: dict[fx.Node, int | None] = {}
        self.arguments: dict[str, int] = {}
        self.assumed = False

    def of(self, node: fx.Node) -> int | None:
        """How many a node's tensor has; None where that isn't known. That of an argument is told, and noted as told."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> int | None:
        name = name_of(node)
        if node.op == "placeholder":
            return self.arguments.setdefault(name, self._told)
        if node.op == "get_attr":
            tensor: Tensor = operator.attrgetter(name)(self._module)
            return tensor.dim()
        if name in _CONCATENATIONS and node.args and isinstance(node.args[0], (list, tuple)):
            found = {self.of(part) if isinstance(part, fx.Node) else None for part in node.args[0]}
            return found.pop() if len(found) == 1 else None
        sources = [operand for operand in node.args if isinstance(operand, fx.Node)]
        if not sources or sources[0] is not node.args[0]:
            return None
        if node.op == "call_module":
            called = self._module.get_submodule(name)
            if isinstance(called, CONVOLUTIONS):
                return self._of_convolution(sources[0], called.weight.dim())
            taken = next((dims for kind, dims in _NORMS.items() if isinstance(called, kind)), None)
            keeps = isinstance(called, nn.Identity) or type(called).__module__ in _KEEPING_FILES or is_norm(called)
            return taken or (self.of(sources[0]) if keeps and not isinstance(called, nn.MultiheadAttention) else None)
        if name in _CONVOLUTIONS:
            return self._of_convolution(sources[0], _CONVOLUTIONS[name])
        if name in _NEW and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
            return len(node.args[1])
        if name in ("mean", "sum") and node.kwargs.get("keepdim") is True:
            return self.of(sources[0])
        # A sum or product has the dimensions of the operand that has the most of them.
        dims = [self.of(operand) for operand in (sources if name in _ELEMENTWISE else sources[:1])]
        known = [d for d in dims if d is not None]
        return max(known) if name in _KEEPING and len(known) == len(dims) else None

    def _of_convolution(self, source: fx.Node, dims: int) -> int:
        """Those of a convolution's result: of a batch, unless its input has one dimension less."""
        known = self.of(source)
        self.assumed |= known is None
        return dims if known is None else known
