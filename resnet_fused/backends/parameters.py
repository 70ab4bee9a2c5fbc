"""Parameters of convolutions as kernels take them, a weight and a bias each, with what backends packed from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class ConvParameters:
    """Weights and biases of a problem's convolutions, batch norms folded in, and what backends packed from them.

    Args:
        weights: one for each convolution of the problem, in the order of its steps; shape (out_channels, in_channels / groups,
            kh, kw).
        biases: one for each convolution, shape (out_channels,), in the weights' dtype.

    Attributes:
        packings: each backend's packed form, made once and shared by the problems (input shapes) that can share it.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self._tensors = tuple(weights), tuple(biases)
        self.packings: dict[Hashable, Any] = {}

    @classmethod
    def joined(cls, parts: Sequence[ConvParameters]) -> ConvParameters:
        """Those of several convolutions, each with its own, as the parameters of one problem."""
        return parts[0] if len(parts) == 1 else _Joined(parts)

    def tensors(self) -> tuple[Tensors, Tensors]:
        """Weights and biases."""
        return self._tensors

    @property
    def weights(self) -> Tensors:
        return self.tensors()[0]

    @property
    def biases(self) -> Tensors:
        return self.tensors()[1]

    def unpacked(self) -> tuple[Tensors, Tensors]:
        """Weights and biases for a kernel that uses them as they are, and keeps them."""
        return self.tensors()

    def part(self, index: int) -> ConvParameters:
        """Those of one convolution, with what was packed from them."""
        return self.pack(
            ("part", index), lambda: ConvParameters(self.weights[index : index + 1], self.biases[index : index + 1])
        )

    def with_bias_of(self, other: ConvParameters) -> ConvParameters:
        """Those of one convolution, with the bias of another added to their own, and with packings of their own."""
        kept = self.packings.get("with bias")
        if kept is None or kept.other is not other:
            kept = self.packings["with bias"] = _WithBias(self, other)
        return kept

    def forget(self) -> None:
        """Drops all packings, which are made again when they are needed."""
        self.packings.clear()

    def pack(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The packing of that key, made by `make` at the first call. Keys start with the backend's name."""
        found = self.packings.get(key)
        if found is None:
            # Two threads may both make it; setdefault lets the first one stand, and the other is dropped.
            found = self.packings.setdefault(key, make())
        return found

    def to(self, dtype: torch.dtype) -> ConvParameters:
        """The parameters in another dtype, with nothing packed from them."""
        weights, biases = self.tensors()
        return ConvParameters([w.to(dtype) for w in weights], [b.to(dtype) for b in biases])

    def packed_bytes(self) -> int:
        """Bytes of all packings. Parts that share the plain parameters count only what was packed from them."""
        return sum(_bytes(value) for value in self.packings.values())


NO_PARAMETERS = ConvParameters((), ())


class LazyConvParameters(ConvParameters):
    """Parameters of one convolution that are made each time they are asked for, and kept by nobody.

    Args:
        make: gives weight and bias.
        unchanged: tells whether what they are made from is as it was.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]], unchanged: Callable[[], bool]) -> None:
        super().__init__((), ())
        self._make, self.unchanged = make, unchanged

    def tensors(self) -> tuple[Tensors, Tensors]:
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = self._make()
        return (weight,), (bias,)

    def unpacked(self) -> tuple[Tensors, Tensors]:
        return self.pack(("unpacked",), self.tensors)

    def part(self, index: int) -> ConvParameters:
        return self


class _Joined(ConvParameters):
    """The parameters of several convolutions, each with its own packings."""

    def __init__(self, parts: Sequence[ConvParameters]) -> None:
        super().__init__((), ())
        self._parts = tuple(parts)

    def tensors(self) -> tuple[Tensors, Tensors]:
        return _concatenated([part.tensors() for part in self._parts])

    def unpacked(self) -> tuple[Tensors, Tensors]:
        return _concatenated([part.unpacked() for part in self._parts])

    def part(self, index: int) -> ConvParameters:
        return self._parts[index]

    def forget(self) -> None:
        super().forget()
        for part in self._parts:
            part.forget()


class _WithBias(ConvParameters):
    """One convolution's parameters, to whose bias another's is added. It belongs to the former, and lives as long."""

    def __init__(self, own: ConvParameters, other: ConvParameters) -> None:
        super().__init__((), ())
        # Not a cycle, in which packings would outlive their model until a garbage collection.
        self._own, self.other = weakref.ref(own), other

    def tensors(self) -> tuple[Tensors, Tensors]:
        own = self._own()
        assert own is not None
        weights, (bias,) = own.tensors()
        (more,) = self.other.biases
        with torch.inference_mode(False), torch.no_grad():
            return weights, ((bias.double() + more.double()).to(bias.dtype),)

    def unpacked(self) -> tuple[Tensors, Tensors]:
        return self.pack(("unpacked",), self.tensors)

    def part(self, index: int) -> ConvParameters:
        return self


def _concatenated(found: Sequence[tuple[Tensors, Tensors]]) -> tuple[Tensors, Tensors]:
    return tuple(w for weights, _ in found for w in weights), tuple(b for _, biases in found for b in biases)


def _bytes(value: Any) -> int:
    if isinstance(value, ConvParameters):
        return value.packed_bytes()
    if isinstance(value, Tensor):
        # Tensors in oneDNN's layout have no storage to ask.
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_bytes(item) for item in value)
    return int(getattr(value, "nbytes", 0))
