"""Folded parameters of layers, made where a backend packs them and kept only in what it packed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.backends import NO_PARAMETERS, ConvParameters
from resnet_fused.backends.parameters import LazyConvParameters
from resnet_fused.backends.problem import Affine, Conv, Types
from resnet_fused.runtime.folding import affine, is_finite, scale_and_shift, scale_filters
from resnet_fused.runtime.kept import Look, Unservable
from resnet_fused.runtime.program import NONE, Layer
from resnet_fused.runtime.released import ReleasedParameter
from resnet_fused.runtime.views import View, viewed_weight


def with_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the tensors whose memory wasn't released."""
    return [t for t in tensors if not isinstance(t, ReleasedParameter)]


def fold_weights(layer: Layer, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Folded weight and bias of a layer, computed in float64 and rounded to the weight's dtype, then to `dtype`.

    Of a batch norm by itself they are scale and shift, of the dtype that sums have.
    """
    weight, bias, mean, var, gamma, beta = (None if t is None else t.detach() for t in tensors[:6])
    if isinstance(layer.operation, Affine):
        assert mean is not None
        assert var is not None
        return scale_and_shift(mean, var, gamma, beta, layer.eps, Types.of(dtype).accumulation)
    assert weight is not None
    if mean is None or var is None:
        # Copies, since the memory of parameters may be released.
        own = weight.new_zeros(weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype, copy=True)
        return weight.to(dtype, copy=True), own
    scale, offset = affine(mean, var, gamma, beta, layer.eps)
    if bias is not None:
        offset = offset + bias.double() * scale
    folded, rounded = scale_filters(weight, scale), offset.to(weight.dtype)
    if weight.dtype == torch.float16:
        for values, exact in ((folded, weight), (rounded, offset)):
            if is_finite(exact) and not is_finite(values):
                raise Unservable(f"folded parameters overflow {weight.dtype}")
    return folded.to(dtype), rounded.to(dtype)


class Parameters:
    """The layers' folded parameters with what was packed from them, shared by all programs of a model.

    What belongs to a layer whose tensors changed is made again; that of the others stays.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[tuple[object, ...], LazyConvParameters] = weakref.WeakValueDictionary()
        self._sources: weakref.WeakKeyDictionary[LazyConvParameters, list[Tensor]] = weakref.WeakKeyDictionary()

    def layer(self, layer: Layer, parameters: Sequence[Tensor], dtype: torch.dtype, view: View) -> LazyConvParameters:
        """A layer's folded parameters in a dtype, for the convolution that it is in a view."""
        tensors = [None if number == NONE else parameters[number] for number in layer.tensors]

        def make() -> tuple[Tensor, Tensor]:
            weight, bias = fold_weights(layer, tensors, dtype)
            return viewed_weight(weight, view), bias

        return self._get((layer.operation, layer.eps, dtype, view), tensors, make)

    def _get(
        self, kind: tuple[object, ...], tensors: Sequence[Tensor | None], make: Callable[[], tuple[Tensor, Tensor]]
    ) -> LazyConvParameters:
        given = [t for t in tensors if t is not None]
        key = (*kind, *map(id, given))
        found = self._kept.get(key)
        # A program that is new to them looks for itself whether they are still what was packed for another.
        if found is None or not found.unchanged():
            found = self._kept[key] = LazyConvParameters(make, Look(given).unchanged)
            self._sources[found] = given
        return found

    def forget_released(self) -> None:
        """Looks from now on at those parameters only whose memory is there."""
        for folded, given in self._sources.items():
            folded.unchanged = Look(with_memory(given)).unchanged

    def step(
        self, layers: Sequence[Layer], parameters: Sequence[Tensor], dtype: torch.dtype, view: View = View.SAME
    ) -> ConvParameters:
        """Folded parameters of a step's layers together."""
        with_some = [layer for layer in layers if isinstance(layer.operation, (Affine, Conv))]
        if not with_some:
            return NO_PARAMETERS
        return ConvParameters.joined([self.layer(layer, parameters, dtype, view) for layer in with_some])

    def linear(self, weight: Tensor, bias: Tensor) -> LazyConvParameters:
        """A classifier's parameters, as those of a convolution on one pixel."""
        return self._get(("linear",), (weight, bias), lambda: (weight.detach()[:, :, None, None], bias.detach()))

    def packed_bytes(self) -> int:
        return sum(folded.packed_bytes() for folded in self._kept.values())
