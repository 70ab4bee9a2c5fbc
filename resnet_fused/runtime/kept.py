"""What is kept for parameters and kinds of calls, and how changes of the parameters are noticed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from resnet_fused.backends import tuning_cache
from resnet_fused.backends.watch import Watch

Value = TypeVar("Value")

# More kinds of input than this are unusual; kernels beyond it are dropped, and their packed weights stay for the others.
_MOST = 64

_version = operator.attrgetter("_version")


class Unservable(Exception):
    """A call that a program can't serve: the model's own forward must run. The message is the reason, for the report."""


class Look:
    """Notices that the values of tensors change.

    In-place changes are seen by version counters, exchanged memory by addresses, and writes that PyTorch doesn't count by the
    samples of a `Watch`.

    Raises:
        Unservable: a tensor was made under inference_mode and doesn't count its changes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [*tensors]
        try:
            self._versions = [*map(_version, self.tensors)]
        except RuntimeError as error:
            raise Unservable(
                "parameters were made under torch.inference_mode, where changes aren't counted; load the model outside of it"
            ) from error
        self._watch = Watch(self.tensors)

    def unchanged(self) -> bool:
        return [*map(_version, self.tensors)] == self._versions and self._watch.unchanged()


class ByKind(Generic[Value]):
    """One value for each kind of call, up to a number of kinds; all are dropped when the tuning cache changes."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Value] = {}
        self._generation = tuning_cache.generation()

    def get(self, kind: Hashable) -> Value | None:
        if self._generation != tuning_cache.generation():
            # By other records other kernels are chosen.
            self._values, self._generation = {}, tuning_cache.generation()
        return self._values.get(kind)

    def put(self, kind: Hashable, value: Value) -> Value:
        """Keeps a value, and gives it. The oldest goes where there are too many."""
        values = self._values  # which another thread may exchange
        while len(values) >= _MOST:
            values.pop(next(iter(values)), None)
        values[kind] = value
        return value

    def values(self) -> list[Value]:
        return [*self._values.values()]

    def __len__(self) -> int:
        return len(self._values)


class Kept(ByKind[Value]):
    """What is kept for parameters that calls bring along, by the kind of call, as long as the parameters are as they were.

    Kept are aliases of the parameters, which don't keep the parameters themselves alive.

    Raises:
        Unservable: a parameter was made under inference_mode and doesn't count its changes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.aliases = tuple(p.detach() for p in parameters)
        self._stamp = _stamp(parameters)
        self._watch = Watch(self.aliases)
        self._made: Any = None

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, with the values that they had."""
        return _stamp(parameters) == self._stamp and self._watch.unchanged()

    def once(self, make: Callable[[tuple[Tensor, ...]], Any]) -> Any:
        """What is made of the aliases, at the first call."""
        if self._made is None:
            self._made = make(self.aliases)
        return self._made


def _stamp(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Addresses and version counters: other ones when a tensor was changed in place, loaded, moved or cast."""
    # By functions that loop in C: this stands before every call.
    try:
        return (*map(Tensor.data_ptr, tensors), *map(_version, tensors))
    except RuntimeError as error:
        raise Unservable(f"a parameter was made under inference_mode: {error}") from error
