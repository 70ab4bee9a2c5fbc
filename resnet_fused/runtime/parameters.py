"""Folded parameters of layers, made where a backend packs them and kept only in what it packed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import folding
from resnet_fused.backends import Folded
from resnet_fused.backends.problem import FoldedLater
from resnet_fused.backends.watch import Watch
from resnet_fused.runtime.program import NONE, Layer

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
        self._addresses = [*map(Tensor.data_ptr, self.tensors)]
        self._watch = Watch(self.tensors)

    def unchanged(self) -> bool:
        return [*map(_version, self.tensors)] == self._versions and self._watch.unchanged()

    def only_memory_changed(self) -> bool:
        """Whether neither version counters nor addresses tell of a change."""
        addresses = [*map(Tensor.data_ptr, self.tensors)]
        return [*map(_version, self.tensors)] == self._versions and addresses == self._addresses


def _fold(layer: Layer, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Folded weight and bias of a layer, computed in float64 and rounded to the weight's dtype, then to `dtype`."""
    weight, bias, mean, var, gamma, beta = (None if t is None else t.detach() for t in tensors)
    assert weight is not None
    assert mean is not None
    assert var is not None
    scale, shift = folding.affine(mean, var, gamma, beta, layer.eps)
    if bias is not None:
        shift = shift + bias.double() * scale
    folded, rounded = folding.scale_filters(weight, scale), shift.to(weight.dtype)
    if weight.dtype == torch.float16:
        for values, exact in ((folded, weight), (rounded, shift)):
            if folding.is_finite(exact) and not folding.is_finite(values):
                raise Unservable(f"folded parameters overflow {weight.dtype}")
    return folded.to(dtype), rounded.to(dtype)


class Parameters:
    """The layers' folded parameters with what was packed from them, shared by all programs of a model.

    What belongs to a layer whose tensors changed is made anew; that of the others stays.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[tuple[object, ...], FoldedLater] = weakref.WeakValueDictionary()

    def layer(self, layer: Layer, parameters: Sequence[Tensor], dtype: torch.dtype) -> FoldedLater:
        """A layer's folded parameters in a dtype."""
        tensors = [None if number == NONE else parameters[number] for number in layer.tensors]
        given = [t for t in tensors if t is not None]
        stamp = (*map(Tensor.data_ptr, given), *map(_version, given))
        key = (layer.conv, layer.eps, dtype, *map(id, given))
        found = self._kept.get(key)
        if found is None or found.stamp != stamp:
            with torch.inference_mode(False), torch.no_grad():
                found = FoldedLater(lambda: _fold(layer, tensors, dtype), stamp)
            self._kept[key] = found
        return found

    def step(self, layers: Sequence[Layer], parameters: Sequence[Tensor], dtype: torch.dtype) -> Folded:
        """Folded parameters of a step's layers together."""
        return Folded.joined([self.layer(layer, parameters, dtype) for layer in layers])

    def linear(self, weight: Tensor, bias: Tensor) -> FoldedLater:
        """A classifier's parameters, as those of a convolution on one pixel."""
        stamp = (weight.data_ptr(), bias.data_ptr(), weight._version, bias._version)
        key = ("linear", id(weight), id(bias))
        found = self._kept.get(key)
        if found is None or found.stamp != stamp:
            found = FoldedLater(lambda: (weight.detach()[:, :, None, None], bias.detach()), stamp)
            self._kept[key] = found
        return found

    def forget(self) -> None:
        """Drops all: for values that changed where no version counter tells."""
        self._kept.clear()

    def packed_bytes(self) -> int:
        return sum(folded.packed_bytes() for folded in self._kept.values())
