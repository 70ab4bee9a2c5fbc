"""What a backend is asked to compute: the geometry of the convolutions and the problem, both hashable."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
Precision = Literal["fast", "exact"]


class Conv(NamedTuple):
    """Geometry of one 2-d convolution, as torch.nn.Conv2d names it; every pair is (height, width)."""

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Conv:
        """Geometry of `conv2d` with this weight, of shape (out_channels, in_channels / groups, kh, kw).

        A dilation along which the filter has one tap means nothing, and becomes 1: oneDNN was seen to crash on others.
        """
        out_channels, in_per_group, kh, kw = weight.shape
        spread = (dilation[0] if kh > 1 else 1, dilation[1] if kw > 1 else 1)
        return cls(in_per_group * groups, out_channels, (kh, kw), _pair(stride), _pair(padding), _pair(spread), groups)

    def output_size(self, height: int, width: int) -> Pair:
        """Spatial size of the output for an input of height × width pixels."""
        h, w = (
            (size + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i, size in enumerate((height, width))
        )
        return h, w

    @property
    def pointwise(self) -> bool:
        """Whether the filter is 1×1 without padding (a matrix product, strided or not)."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    def fails_in_channels_last(self, width: int) -> bool:
        """Whether oneDNN, and stock PyTorch by it, was seen to fail on channels_last images of that width.

        It crashes where a filter is dilated and no window has a pixel of the image, all of them lying in the padding or
        stepping over it. It adds up wrong numbers where each group has one channel, the stride is one of columns alone, and
        the result is one column. Contiguous tensors it takes.
        """
        kernel, stride, padding, dilation = (pair[1] for pair in self[2:6])
        if self.in_channels == self.groups and self.stride[0] == 1 and stride > 1 and self.output_size(1, width)[1] == 1:
            return True
        # Nearly always a tap of the first window lies on the first pixel, and the width isn't asked for.
        if dilation == 1 or padding in range(0, kernel * dilation, dilation):
            return False
        columns = range(self.output_size(1, width)[1])
        return not any(0 <= stride * column + dilation * tap - padding < width for column in columns for tap in range(kernel))

    def flatten(self) -> list[int]:
        """The seven integers by which an operator's schema carries what the weight's shape doesn't tell."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def unflatten(cls, weights: Sequence[Tensor], geometry: Sequence[int]) -> tuple[Conv, ...]:
        """Inverse of `flatten`, for as many convolutions as there are weights."""
        parts = [geometry[7 * i : 7 * i + 7] for i in range(len(weights))]
        return tuple(cls.of(w, p[0:2], p[2:4], p[4:6], p[6]) for w, p in zip(weights, parts, strict=True))


class Pool(NamedTuple):
    """Geometry of a max-pool (dilation 1, floor mode), as torch.nn.MaxPool2d names it."""

    kernel: Pair
    stride: Pair
    padding: Pair


def _pair(values: Sequence[int]) -> Pair:
    height, width = values
    return int(height), int(width)


@dataclass(frozen=True)
class Problem:
    """One op on inputs of one kind: all that the choice and the preparation of a kernel may depend on.

    Attributes:
        op: the op's name, such as "conv2d_bn_relu" or "bottleneck".
        shape: of the input, (N, C, H, W).
        dtype: of the input, the weights and the result.
        device: where all tensors are.
        convs: the op's convolutions in order of the arithmetic: the main path first, then the projection shortcut.
        shortcut: whether the last of `convs` is a projection shortcut (basic_block and bottleneck).
        pool: the max-pool behind a stem.
        memory_format: of the result, by stock PyTorch's rule (channels_last if the input or a weight is).
        precision: "exact" forbids algorithms that trade rounding for speed; "fast" leaves the choice to the backend.
    """

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    convs: tuple[Conv, ...] = ()
    shortcut: bool = False
    pool: Pool | None = None
    memory_format: torch.memory_format = torch.channels_last
    precision: Precision = "fast"

    @property
    def main_path(self) -> tuple[Conv, ...]:
        return self.convs[:-1] if self.shortcut else self.convs

    def output_shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.shape
        for conv in self.main_path:
            h, w = conv.output_size(h, w)
            c = conv.out_channels
        if self.pool is not None:
            k, s, p = self.pool
            h, w = ((size + 2 * p[i] - k[i]) // s[i] + 1 for i, size in enumerate((h, w)))
        return n, c, h, w

    def shortcut_shape(self) -> tuple[int, int, int, int]:
        """Shape of the projection shortcut's result, which must be the result's where there is one."""
        n, _, h, w = self.shape
        conv = self.convs[-1]
        return n, conv.out_channels, *conv.output_size(h, w)

    def tf32_allowed(self) -> bool:
        """Whether TF32 may be used now: by torch.backends.cudnn.conv.fp32_precision, and not with precision="exact"."""
        setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return self.dtype == torch.float32 and self.precision != "exact" and setting == "tf32"

    def __str__(self) -> str:
        convs = ", ".join(f"{c.in_channels}→{c.out_channels} {c.kernel[0]}×{c.kernel[1]}/{c.stride[0]}" for c in self.convs)
        shape = "×".join(map(str, self.shape))
        return f"{self.op}({shape} {str(self.dtype).removeprefix('torch.')} on {self.device}; {convs})"


class Folded:
    """Folded parameters of one op, and what backends packed from them.

    Args:
        weights: one per convolution of the problem, in its order; shape (out_channels, in_channels / groups, kh, kw).
        shifts: one per convolution, shape (out_channels,), in the weights' dtype.

    Attributes:
        packings: each backend's packed form, made once and shared by the problems (input shapes) that can share it.
    """

    def __init__(self, weights: Sequence[Tensor], shifts: Sequence[Tensor]) -> None:
        self._tensors = tuple(weights), tuple(shifts)
        self.packings: dict[Hashable, Any] = {}

    @classmethod
    def joined(cls, parts: Sequence[Folded]) -> Folded:
        """Those of several convolutions, each with its own, as the parameters of one op."""
        return parts[0] if len(parts) == 1 else _Joined(parts)

    def tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and shifts."""
        return self._tensors

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.tensors()[0]

    @property
    def shifts(self) -> tuple[Tensor, ...]:
        return self.tensors()[1]

    def plain(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and shifts for a kernel that uses them as they are, and keeps them."""
        return self.tensors()

    def part(self, index: int) -> Folded:
        """Those of one convolution, with what was packed from them."""
        return self.pack(("part", index), lambda: Folded(self.weights[index : index + 1], self.shifts[index : index + 1]))

    def with_shift_of(self, other: Folded) -> Folded:
        """Those of one convolution, with the shift of another added to their own, and with packings of their own."""
        kept = self.packings.get("with shift")
        if kept is None or kept.other is not other:
            kept = self.packings["with shift"] = _WithShift(self, other)
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

    def to(self, dtype: torch.dtype) -> Folded:
        """The parameters in another dtype, with nothing packed from them."""
        weights, shifts = self.tensors()
        return Folded([w.to(dtype) for w in weights], [s.to(dtype) for s in shifts])

    def packed_bytes(self) -> int:
        """Bytes of all packings. Parts that share the plain parameters count only what was packed from them."""
        return sum(_bytes(value) for value in self.packings.values())


class FoldedLater(Folded):
    """Folded parameters of one convolution that are made each time they are asked for, and kept by nobody.

    Args:
        make: gives weight and shift.
        unchanged: tells whether what they are made from is as it was.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]], unchanged: Callable[[], bool]) -> None:
        super().__init__((), ())
        self._make, self.unchanged = make, unchanged

    def tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with torch.inference_mode(False), torch.no_grad():
            weight, shift = self._make()
        return (weight,), (shift,)

    def plain(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.pack(("plain",), self.tensors)

    def part(self, index: int) -> Folded:
        return self


class _Joined(Folded):
    """The parameters of several convolutions, each with its own packings."""

    def __init__(self, parts: Sequence[Folded]) -> None:
        super().__init__((), ())
        self._parts = tuple(parts)

    def tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        found = [part.tensors() for part in self._parts]
        return tuple(w for weights, _ in found for w in weights), tuple(s for _, shifts in found for s in shifts)

    def plain(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        found = [part.plain() for part in self._parts]
        return tuple(w for weights, _ in found for w in weights), tuple(s for _, shifts in found for s in shifts)

    def part(self, index: int) -> Folded:
        return self._parts[index]

    def forget(self) -> None:
        super().forget()
        for part in self._parts:
            part.forget()


class _WithShift(Folded):
    """One convolution's parameters, to whose shift another's is added. It belongs to the former, and lives as long."""

    def __init__(self, own: Folded, other: Folded) -> None:
        super().__init__((), ())
        # Not a cycle, in which packings would outlive their model until a garbage collection.
        self._own, self.other = weakref.ref(own), other

    def tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        own = self._own()
        assert own is not None
        weights, (shift,) = own.tensors()
        (more,) = self.other.shifts
        with torch.inference_mode(False), torch.no_grad():
            return weights, ((shift.double() + more.double()).to(shift.dtype),)

    def plain(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.pack(("plain",), self.tensors)

    def part(self, index: int) -> Folded:
        return self


def _bytes(value: Any) -> int:
    if isinstance(value, Folded):
        return value.packed_bytes()
    if isinstance(value, Tensor):
        # Tensors in oneDNN's layout have no storage to ask.
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_bytes(item) for item in value)
    return int(getattr(value, "nbytes", 0))
