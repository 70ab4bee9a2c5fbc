"""Stand-ins for the tensors of a forward that is traced. What is done with them is noted down; what they can't tell ends it."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from resnet_fused.fusion.screening import CannotTrace, is_trusted

_TENSOR_NAMES = frozenset(dir(Tensor))


class StandIn(fx.Proxy):
    """A stand-in for a tensor, with a tensor's attributes and no others.

    Its tracer (`tracing.Tracer`) tells what is known of its node (`dims_of`, `shape_of`, `is_tensor`), and what is called now
    (`screen`).
    """

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance asks. PyTorch's own code, and ours, deal with stand-ins as what they are.

        PyTorch's compiled code asks so, too, and reads the memory of what says that it is a tensor. So the answer is for calls
        of isinstance itself.
        """
        frame = sys._getframe(1)
        if frame is not self.tracer.screen.asking:
            return type(self)
        if is_trusted(frame.f_code) and frame.f_code is not torch.is_tensor.__code__:
            return type(self)
        if not self.tracer.is_tensor(self.node):
            raise CannotTrace("asks for the type of a value")
        return Tensor

    def __getattr__(self, name: str) -> Any:
        if name not in _TENSOR_NAMES:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name == "ndim":
            return self.dim()
        shape = self.tracer.shape_of(self.node) if name == "shape" else None
        return _Attribute(self, name) if shape is None else shape

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise CannotTrace(f"assigns the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def size(self, dim: Any = None) -> Any:
        shape = self.tracer.shape_of(self.node)
        if shape is None:
            return _Attribute(self, "size")(*(() if dim is None else (dim,)))
        return shape if dim is None else shape[dim]

    def dim(self) -> Any:
        dims = self.tracer.dims_of(self.node)
        return _Attribute(self, "dim")() if dims is None else dims

    def numel(self) -> Any:
        shape = self.tracer.shape_of(self.node)
        if shape is not None:
            return shape.numel()
        if self.tracer.training or self.tracer.dims_of(self.node) is None:
            return _Attribute(self, "numel")()
        return _Count(self.tracer.create_node("call_method", "numel", (self.node,), {}), self.tracer)

    def __len__(self) -> int:
        shape = self.tracer.shape_of(self.node)
        if shape is None:
            raise CannotTrace("asks for the length of a tensor")
        return shape[0]

    def __setitem__(self, key: Any, value: Any) -> None:
        raise CannotTrace("writes into elements of a tensor")

    def __bool__(self) -> bool:
        raise CannotTrace("branches on a tensor's values or size")

    def __iter__(self) -> Any:
        # `n, c, h, w = x.shape` says how many there must be; a loop doesn't.
        frame = sys._getframe(1)
        caller = next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)
        if caller.opname == "UNPACK_SEQUENCE":
            return iter([self[i] for i in range(caller.argval)])  # type: ignore[index]
        shape = self.tracer.shape_of(self.node)
        if shape is None:
            raise CannotTrace("iterates over a tensor")
        return iter([self[i] for i in range(shape[0])])  # type: ignore[index]

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


class _Attribute(StandIn, Attribute):
    """An attribute of a stand-in, or a method of it that is about to be called."""

    __init__ = Attribute.__init__
    node = Attribute.node
    __call__ = Attribute.__call__


class _Count(StandIn):
    """A number of elements. Programs for inference serve tensors that have some."""

    def __eq__(self, other: object) -> Any:
        return False if other == 0 else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return True if other == 0 else super().__ne__(other)

    def __gt__(self, other: Any) -> Any:
        return True if other == 0 else super().__gt__(other)  # type: ignore[misc]

    __hash__ = object.__hash__
