"""Fused modules for inference, as `rf.fuse` puts them into a model: folded parameters, one op each.

Their parameters are plain tensors in stock layout, so that the modules can be copied, saved, moved, cast, compiled and
exported; what backends packed from them is a cache beside, never saved, and dropped when a parameter changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.backends import Conv, Kernel, Pool, Precision, Problem
from resnet_fused.modules.folding import check_conv, fold
from resnet_fused.modules.settled import Settling
from resnet_fused.ops.checks import check_tensor
from resnet_fused.ops.common import Runner, autocast_dtype, plain, plain_eager, stamp


class FusedModule(Settling):
    """Base of the fused modules: runs `op` on the folded parameters of its convolutions.

    Args:
        precision: as in `rf.fuse`.
        backend: name of the backend, or "auto".
        channels_last: whether results are channels_last always, instead of by stock's rule.
    """

    op: str
    residual = False

    def __init__(self, precision: Precision, backend: str, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.precision: Precision = precision
        self.backend = backend
        self._runner: Runner | None = None
        self._cast: dict[torch.dtype, tuple[Any, list[Tensor], list[Tensor]]] = {}

    def convolutions(self) -> list[FusedConv2d]:
        """The module's convolutions in the op's order."""
        raise NotImplementedError

    def folded_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and shifts of the convolutions, in the op's order."""
        own = [conv._parameters for conv in self.convolutions()]
        return [p["weight"] for p in own], [p["shift"] for p in own]  # type: ignore[misc]

    def _new_runner(self) -> Runner:
        raise NotImplementedError

    def _call_op(self, x: Tensor, residual: Tensor | None, weights: list[Tensor], shifts: list[Tensor]) -> Tensor:
        """The registered operator, for tracing, autograd and tensor subclasses."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runner": None, "_cast": {}}

    def watched(self) -> list[dict[str, Any]]:
        return [self._modules, *(conv._parameters for conv in self.convolutions())]

    def find_kernel(self, x: Tensor, residual: Tensor | None) -> Kernel | None:
        weights, shifts = self.folded_parameters()
        return self._own_runner().kernel(x, residual, weights, shifts) if plain(*weights) and x.dim() != 3 else None

    def _own_runner(self) -> Runner:
        runner = self._runner
        if runner is None:
            runner = self._runner = self._new_runner()
        return runner

    def _run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        kernel = self.kernel(x, residual)
        if kernel is not None:
            return kernel(x, residual)
        check_tensor("x", x)
        if isinstance(x, Tensor) and x.dim() == 3:
            # An image without its batch is a batch of one behind a FrozenBatchNorm2d, by the broadcasting of its vectors.
            return self._run(x.unsqueeze(0), residual)
        weights, shifts = self.folded_parameters()
        dtype = autocast_dtype(x.device.type)
        # As stock's convolution under autocast, which leaves float64 and what isn't floating-point alone.
        if dtype is not None and torch.float64 not in (weights[0].dtype, x.dtype) and x.is_floating_point():
            weights, shifts = self._cast_to(dtype, weights, shifts)
            x = x.to(dtype)
            residual = residual.to(dtype) if residual is not None else None
        if not plain_eager(x, residual, *weights):
            return self._call_op(x, residual, weights, shifts)
        return self._own_runner()(x, residual, weights, shifts)

    def _cast_to(self, dtype: torch.dtype, weights: list[Tensor], shifts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if weights[0].dtype == dtype:
            return weights, shifts
        if not plain(*weights):
            return [w.to(dtype) for w in weights], [s.to(dtype) for s in shifts]
        now = stamp((*weights, *shifts))
        kept = self._cast.get(dtype)
        if kept is None or kept[0] != now:
            # Outside of inference mode, so that the copies count their changes like all parameters.
            with torch.inference_mode(False), torch.no_grad():
                kept = (now, [w.to(dtype) for w in weights], [s.to(dtype) for s in shifts])
            self._cast[dtype] = kept
        return kept[1], kept[2]

    def packed_bytes(self) -> int:
        """Bytes of what backends packed from the parameters, beside the parameters themselves."""
        copies = sum(t.nbytes for _, w, s in self._cast.values() for t in (*w, *s))
        return copies + (self._runner.packed_bytes() if self._runner is not None else 0)

    def backends_used(self) -> dict[str, Problem]:
        """The backends that served this module so far, each with a problem that it served."""
        return dict(self._runner.backends_used) if self._runner is not None else {}


class FusedConv2d(FusedModule):
    """conv2d with the batch norm folded in, and what follows it: y = act(conv2d(x, weight) + shift [+ residual]).

    Args:
        weight: folded, shape (out_channels, in_channels / groups, kh, kw).
        shift: folded, shape (out_channels,).
        stride, padding, dilation, groups: as nn.Conv2d, padding in pixels.
        relu: whether ReLU follows.
        pad: pixels to add before the convolution by F.pad (left, right, top, bottom), for padding modes and uneven padding.
        pad_mode: mode of F.pad.
        precision, backend, channels_last: as in `FusedModule`.
    """

    def __init__(
        self,
        weight: Tensor,
        shift: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        relu: bool = False,
        pad: Sequence[int] = (),
        pad_mode: str = "constant",
        precision: Precision = "fast",
        backend: str = "auto",
        channels_last: bool = True,
    ) -> None:
        super().__init__(precision, backend, channels_last)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.shift = nn.Parameter(shift.detach(), requires_grad=False)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.relu = relu
        self.pad, self.pad_mode = list(pad), pad_mode

    @classmethod
    def of(
        cls,
        conv: nn.Module,
        norm: nn.Module,
        relu: bool = False,
        precision: Precision = "fast",
        backend: str = "auto",
        channels_last: bool = True,
    ) -> FusedConv2d:
        """norm(conv(x)), with ReLU behind it if `relu`, folded.

        Raises:
            NotFoldable: with the reason.
        """
        conv = check_conv(conv)
        weight, shift = fold(conv, norm)
        padding, pad, pad_mode = _padding(conv)
        return cls(
            weight.contiguous(memory_format=torch.channels_last) if channels_last else weight,
            shift,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            relu=relu,
            pad=pad,
            pad_mode=pad_mode,
            precision=precision,
            backend=backend,
            channels_last=channels_last,
        )

    @classmethod
    def like(cls, other: FusedConv2d, relu: bool) -> FusedConv2d:
        """The same convolution on the same parameters, with another end."""
        return cls(
            other.weight,
            other.shift,
            stride=other.stride,
            padding=other.padding,
            dilation=other.dilation,
            groups=other.groups,
            relu=relu,
            pad=other.pad,
            pad_mode=other.pad_mode,
            precision=other.precision,
            backend=other.backend,
            channels_last=other.channels_last,
        )

    @property
    def conv(self) -> Conv:
        return Conv.of(self.weight, self.stride, self.padding, self.dilation, self.groups)

    def convolutions(self) -> list[FusedConv2d]:
        return [self]

    def _new_runner(self) -> Runner:
        op = "conv2d_bn_add_relu" if self.residual else "conv2d_bn_relu" if self.relu else "conv2d_bn"
        return Runner(op, (self.conv,), precision=self.precision, backend=self.backend, channels_last=self.channels_last)

    def _call_op(self, x: Tensor, residual: Tensor | None, weights: list[Tensor], shifts: list[Tensor]) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            return ops.conv2d_bn_add_relu(x, weights[0], shifts[0], residual, *geometry)
        op = ops.conv2d_bn_relu if self.relu else ops.conv2d_bn
        return op(x, weights[0], shifts[0], *geometry)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad, self.pad_mode)
        return self._run(x)

    def extra_repr(self) -> str:
        c = self.conv
        tail = ", relu" if self.relu else ""
        return f"{c.in_channels}, {c.out_channels}, kernel={c.kernel}, stride={c.stride}, padding={c.padding}{tail}"


def _padding(conv: nn.Conv2d) -> tuple[tuple[int, int], list[int], str]:
    """Padding for the op, and what F.pad must add before it: all of it where it is uneven or not of zeros."""
    if isinstance(conv.padding, str):
        total = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        # As stock: an odd number puts the extra pixel behind.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(int(p), int(p)) for p in conv.padding]
    (top, bottom), (left, right) = sides
    if conv.padding_mode == "zeros" and top == bottom and left == right:
        return (top, left), [], "constant"
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pad = [left, right, top, bottom]
    return (0, 0), (pad if any(pad) else []), mode


class FusedConv2dAdd(FusedConv2d):
    """conv2d with the batch norm folded in, a residual and ReLU: y = relu(conv2d(x, weight) + shift + residual)."""

    residual = True

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        if self.pad:
            x = F.pad(x, self.pad, self.pad_mode)
        return self._run(x, residual)


class FusedStem(FusedModule):
    """y = max_pool2d(relu(conv2d(x, weight) + shift)), the entry of a ResNet as one op."""

    op = "stem"

    def __init__(self, conv: FusedConv2d, pool: Pool) -> None:
        super().__init__(conv.precision, conv.backend, conv.channels_last)
        self.conv = conv
        self.pool = pool

    def convolutions(self) -> list[FusedConv2d]:
        return [self.conv]

    def _new_runner(self) -> Runner:
        return Runner("stem", (self.conv.conv,), False, self.pool, self.precision, self.backend, self.channels_last)

    def _call_op(self, x: Tensor, residual: Tensor | None, weights: list[Tensor], shifts: list[Tensor]) -> Tensor:
        return ops.stem(x, weights[0], shifts[0], self.conv.conv.flatten(), [v for pair in self.pool for v in pair])

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


class FusedBlock(FusedModule):
    """A residual block as one op: y = relu(conv_n(… relu(conv_1(x)) …) + shortcut(x)), two or three convolutions.

    Args:
        convs: the main path, two (basic_block) or three (bottleneck) convolutions.
        shortcut: the projection, or None for the identity.
    """

    def __init__(self, convs: Sequence[FusedConv2d], shortcut: FusedConv2d | None) -> None:
        super().__init__(convs[0].precision, convs[0].backend, convs[0].channels_last)
        self.op = {2: "basic_block", 3: "bottleneck"}[len(convs)]
        for index, conv in enumerate(convs, 1):
            self.add_module(f"conv{index}", conv)
        self.register_module("shortcut", shortcut)
        self._names = [name for name, conv in self._modules.items() if conv is not None]

    def convolutions(self) -> list[FusedConv2d]:
        modules = self._modules
        return [modules[name] for name in self._names]  # type: ignore[misc]

    def _new_runner(self) -> Runner:
        convs = tuple(conv.conv for conv in self.convolutions())
        return Runner(self.op, convs, self.shortcut is not None, None, self.precision, self.backend, self.channels_last)

    def _call_op(self, x: Tensor, residual: Tensor | None, weights: list[Tensor], shifts: list[Tensor]) -> Tensor:
        geometry = [number for conv in self.convolutions() for number in conv.conv.flatten()]
        op = ops.basic_block if self.op == "basic_block" else ops.bottleneck
        return op(x, weights, shifts, geometry)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)
