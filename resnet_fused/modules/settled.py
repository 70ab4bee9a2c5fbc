"""What a module's calls come to, kept for as long as nothing changes that they depend on.

Between two kernels of a network nothing that Python touches is left in the caches, and a look at each parameter in the usual
way takes several times what it takes in a benchmark of its own: 20 µs a residual block, where the kernels of a bottleneck take
400. So what a call depends on is noted down flat, and compared by functions that loop in C.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import Kernel, choice, records
from resnet_fused.ops.common import MAX_KERNELS, call_key, plain, stamp

if TYPE_CHECKING:
    from typing_extensions import Self


class Settled:
    """Kernels by kind of call, and what they were made from.

    Args:
        watched: dicts whose values must stay the same objects, and, where these are tensors, unchanged.

    Raises:
        RuntimeError: a tensor was made under inference_mode and doesn't count its changes.
    """

    def __init__(self, watched: Sequence[dict[str, Any]]) -> None:
        self._watched = watched
        self._values = self._look()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._stamp = self._new_stamp()
        self.kernels: dict[Hashable, Kernel] = {}

    def _look(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(dict.values, self._watched))]

    def _new_stamp(self) -> tuple[int, ...]:
        return (records.generation(), *stamp(self._tensors))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        now = self._look()
        return len(now) == len(self._values) and all(map(operator.is_, now, self._values)) and self._new_stamp() == self._stamp


class Settling(nn.Module):
    """A module that keeps what its plain calls come to. `backend`: name of the backend that it was given, or "auto".

    Its parameters count their changes, even if it is copied, loaded, moved or cast under inference_mode. Otherwise nothing that
    was derived from them could be kept.
    """

    # Defaults for what PyTorch makes of a class by itself, such as a slice of a Sequential.
    backend: str = "auto"
    _settled: Settled | None = None

    def __getstate__(self) -> dict[str, Any]:
        # copy, deepcopy and pickle all come through here; what is kept is found anew where it is needed.
        return {**self.__dict__, "_settled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter is not None and parameter.is_inference():
                    self._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    def watched(self) -> list[dict[str, Any]]:
        """The dicts that hold what a call depends on."""
        raise NotImplementedError

    def find_kernel(self, x: Tensor, residual: Tensor | None) -> Kernel | None:
        """The kernel of a call that nothing watches, looked for anew; None where there is none."""
        raise NotImplementedError

    def kernel(self, x: Tensor, residual: Tensor | None = None) -> Kernel | None:
        """The kernel of a call; None where there is none, or something else must see the call: autograd, tracing, autocast."""
        if x is None or not plain(x, residual) or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            return None
        if x.layout is not torch.strided:
            return None
        key = call_key(x, residual, choice(self.backend))
        settled = self._settled
        if settled is None or not settled.holds():
            try:
                settled = Settled(self.watched())
            except RuntimeError:
                return self.find_kernel(x, residual)
            self._settled = settled
        kernel = settled.kernels.get(key)
        if kernel is None:
            kernel = self.find_kernel(x, residual)
            if kernel is not None:
                if len(settled.kernels) >= MAX_KERNELS:
                    settled.kernels.clear()
                settled.kernels[key] = kernel
        return kernel


class TakingOver(Settling):
    """A `Settling` module that takes the place of a plain one of PyTorch in the same object: its parameters and hooks stay."""

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Whether a module is a plain one that this class can take over."""
        raise NotImplementedError

    @classmethod
    def take_over(cls, module: nn.Module, backend: str) -> None:
        """Turns a module that it `replaces` into one of this class, in place."""
        module.__class__ = cls
        vars(module)["backend"] = backend

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.kernel(input)
        return super().forward(input) if kernel is None else kernel(input, None)
