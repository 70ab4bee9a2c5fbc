"""What a backend is asked to compute: steps on numbered values, each an operation with its epilogue; all of it hashable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
Sizes = tuple[int, ...]
"""One number for each spatial dimension, in their order: (height, width), or (depth, height, width)."""
Shape = tuple[int, ...]
Precision = Literal["fast", "direct"]
PRECISIONS: dict[str, Precision] = {"fast": "fast", "direct": "direct", "exact": "direct"}
"""By the names that users may give; "exact" is an old one."""


class Conv(NamedTuple):
    """Geometry of one convolution of any number of dimensions, as torch.nn.Conv2d names it."""

    in_channels: int
    out_channels: int
    kernel: Sizes
    stride: Sizes = (1, 1)
    padding: Sizes = (0, 0)
    dilation: Sizes = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Conv:
        """Geometry of a convolution with this weight, of shape (out_channels, in_channels / groups, kh, kw) in two dimensions.

        A dilation along which the filter has one tap means nothing, and becomes 1: oneDNN was seen to crash on others.
        """
        out_channels, in_per_group, *kernel = weight.shape
        spread = _sizes([d if taps > 1 else 1 for taps, d in zip(kernel, dilation, strict=True)])
        return cls(in_per_group * groups, out_channels, _sizes(kernel), _sizes(stride), _sizes(padding), spread, groups)

    @property
    def dims(self) -> int:
        """How many spatial dimensions it has."""
        return len(self.kernel)

    def output_size(self, *size: int) -> Sizes:
        """Spatial size of the output for an input of a spatial size."""
        return tuple(
            (s + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i, s in enumerate(size)
        )

    @property
    def pointwise(self) -> bool:
        """Whether the filter is 1×1 without padding (a matrix product, strided or not)."""
        return {*self.kernel} == {1} and {*self.padding} == {0}

    @property
    def geometry(self) -> list[int]:
        """Kernel, stride, padding and dilation, two integers each, as the compiled operators take them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    def fails_in_channels_last(self, width: int) -> bool:
        """Whether oneDNN, and stock PyTorch by it, was seen to fail on channels_last images of that width.

        It crashes where a filter is dilated and no window has a pixel of the image, all of them lying in the padding or
        stepping over it. It adds up wrong numbers where each group has one channel, the stride is one of columns alone, and
        the result is one column. Contiguous tensors it takes.
        """
        kernel, stride, padding, dilation = (sizes[-1] for sizes in self[2:6])
        columns = (width + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if self.in_channels == self.groups and min(self.stride[:-1], default=1) == 1 and stride > 1 and columns == 1:
            return True
        # Nearly always a tap of the first window lies on the first pixel, and the width isn't asked for.
        if dilation == 1 or padding in range(0, kernel * dilation, dilation):
            return False
        taps = range(kernel)
        return not any(0 <= stride * column + dilation * tap - padding < width for column in range(columns) for tap in taps)

    def flatten(self) -> list[int]:
        """The seven integers by which an operator's schema carries what the weight's shape doesn't tell."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def unflatten(cls, weights: Sequence[Tensor], geometry: Sequence[int]) -> tuple[Conv, ...]:
        """Inverse of `flatten`, for as many convolutions as there are weights."""
        parts = [geometry[7 * i : 7 * i + 7] for i in range(len(weights))]
        return tuple(cls.of(w, p[0:2], p[2:4], p[4:6], p[6]) for w, p in zip(weights, parts, strict=True))


class Linear(NamedTuple):
    """A matrix product with a bias, as torch.nn.Linear has it, on an input of shape (N, in_features, 1, 1)."""

    in_features: int
    out_features: int


class Affine(NamedTuple):
    """y = x · scale + shift, with a scale and a shift for each channel: a batch norm in inference that follows no convolution.

    Attributes:
        channels: of each of the tensors whose concatenation along channels x is; one where nothing is concatenated.
    """

    channels: tuple[int, ...]


class TrainingConv(NamedTuple):
    """A convolution in training, without bias: its result, and the gradients of its input and of its weights."""

    conv: Conv


class Pool(NamedTuple):
    """Geometry of a max-pool (dilation 1, floor mode) of any number of dimensions, as torch.nn.MaxPool2d names it."""

    kernel: Sizes
    stride: Sizes
    padding: Sizes

    def output_size(self, *size: int) -> Sizes:
        """Spatial size of the output for an input of a spatial size."""
        return tuple((s + 2 * self.padding[i] - self.kernel[i]) // self.stride[i] + 1 for i, s in enumerate(size))


class Pointwise(str, Enum):
    """Operations without parameters of their own shape. As text: programs can be written down."""

    IDENTITY = "identity"
    """Nothing but the epilogue."""
    BATCH_NORM = "batch norm"
    RELU_GRADIENT = "gradient of relu"
    """Reads the gradient by relu's result, and the result."""
    AVERAGE_POOL = "average pool"
    """The mean over all pixels of an image, of shape (N, C, 1, 1)."""


Operation = Conv | Linear | Affine | TrainingConv | Pointwise


class Activation(str, Enum):
    """The function at the end of an epilogue, as torch.nn.functional names it. As text: programs can be written down."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"
    LEAKY_RELU = "leaky_relu"
    SIGMOID = "sigmoid"
    SILU = "silu"
    HARDSIGMOID = "hardsigmoid"
    HARDSWISH = "hardswish"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    """GELU by its approximation with tanh."""


class Epilogue(NamedTuple):
    """What follows the sums of an operation, before its result is stored.

        y = pool(activation((sums + bias) · gate + residual))

    Attributes:
        residual: whether a tensor of the result's shape (before the pool) is added.
        activation: the function.
        pool: the max-pool, if there is one.
        bias: whether the bias is added; without, it is added elsewhere.
        slope: of a leaky ReLU, below zero.
        gate: whether the sums are multiplied by a tensor of shape (N, C, 1, 1).
    """

    residual: bool = False
    activation: Activation = Activation.NONE
    pool: Pool | None = None
    bias: bool = True
    slope: float = 0.0
    gate: bool = False

    @property
    def relu(self) -> bool:
        return self.activation is Activation.RELU


NO_EPILOGUE = Epilogue()
"""Nothing but the bias."""

X, RESIDUAL, FIRST_RESULT = 0, 1, 2
"""Numbers of values: a problem's input, its residual (the second input, if there is one), and the first step's result."""

MORE = FIRST_RESULT
"""The number of the first further input of a problem of one step that has some; its result has the number after theirs."""


class Step(NamedTuple):
    """One operation with its epilogue.

    Attributes:
        reads: numbers of the values that it reads: its input, then the residual, if there is one, then what else it reads: what
            is concatenated after its input, and the gate.
    """

    operation: Operation
    epilogue: Epilogue = Epilogue()
    reads: tuple[int, ...] = (X,)

    def result_shape(self, shape: Shape) -> Shape:
        """Shape of its result for an input of a shape."""
        n, c, *size = shape
        conv = self.operation.conv if isinstance(self.operation, TrainingConv) else self.operation
        if isinstance(conv, Conv):
            c, size = conv.out_channels, [*conv.output_size(*size)]
        elif isinstance(conv, Linear):
            c = conv.out_features
        elif isinstance(conv, Affine):
            c = sum(conv.channels)
        elif conv is Pointwise.AVERAGE_POOL:
            size = [1] * len(size)
        if self.epilogue.pool is not None:
            size = [*self.epilogue.pool.output_size(*size)]
        return n, c, *size


class Kind(Enum):
    """What an implementation computes: one operation, or a program of several."""

    CONVOLUTION = "convolution"
    CONVOLUTION_ND = "convolution in one or three dimensions"
    LINEAR = "linear"
    TRAINING_CONV = "convolution in training"
    ELEMENTWISE = "elementwise"
    AFFINE = "affine"
    BATCH_NORM = "batch norm"
    AVERAGE_POOL = "average pool"
    PROGRAM = "program"


_KINDS: dict[type | Pointwise, Kind] = {
    Conv: Kind.CONVOLUTION,
    Linear: Kind.LINEAR,
    Affine: Kind.AFFINE,
    TrainingConv: Kind.TRAINING_CONV,
    Pointwise.IDENTITY: Kind.ELEMENTWISE,
    Pointwise.RELU_GRADIENT: Kind.ELEMENTWISE,
    Pointwise.BATCH_NORM: Kind.BATCH_NORM,
    Pointwise.AVERAGE_POOL: Kind.AVERAGE_POOL,
}


class Types(NamedTuple):
    """The dtypes of a problem's tensors: its inputs, its weights and biases, its result, and the sums in between."""

    source: torch.dtype
    weight: torch.dtype
    destination: torch.dtype
    accumulation: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype) -> Types:
        """One dtype for all tensors, with sums in float32, or float64 for float64."""
        return cls(dtype, dtype, dtype, torch.float64 if dtype == torch.float64 else torch.float32)


class Block(NamedTuple):
    """A problem's steps as a residual block: convolutions of the main path, and of the projection shortcut, if there is one."""

    main: tuple[Conv, ...]
    shortcut: Conv | None


def residual_block(main: Sequence[Conv], shortcut: Conv | None) -> tuple[Step, ...]:
    """The steps of y = relu(conv_n(… relu(conv_1(x)) …) + shortcut(x)). A projection shortcut comes first."""
    steps = [] if shortcut is None else [Step(shortcut)]
    residual = X if shortcut is None else FIRST_RESULT
    source = X
    for conv in main[:-1]:
        steps.append(Step(conv, Epilogue(activation=Activation.RELU), (source,)))
        source = FIRST_RESULT + len(steps) - 1
    steps.append(Step(main[-1], Epilogue(residual=True, activation=Activation.RELU), (source, residual)))
    return tuple(steps)


@dataclass(frozen=True)
class Problem:
    """Steps on inputs of one kind: all that the choice and the preparation of a kernel may depend on.

    Values are numbered: 0 is the input x, 1 the residual, 2 the first step's result, and so on. The last step's is the result.
    A problem of one step may have more inputs, which come before its result: what is concatenated after x, and a gate.

    Attributes:
        steps: in the order in which they are computed.
        shape: of x, (N, C, H, W); in one dimension (N, C, L), in three (N, C, D, H, W).
        types: of the tensors.
        device: where all tensors are.
        memory_format: of the result, by stock PyTorch's rule (channels_last if the input or a weight is). In three dimensions
            channels_last_3d.
        precision: "direct" forbids algorithms that trade rounding for speed; "fast" leaves the choice to the backend.
    """

    steps: tuple[Step, ...]
    shape: Shape
    types: Types
    device: torch.device
    memory_format: torch.memory_format = torch.channels_last
    precision: Precision = "fast"

    @classmethod
    def of(
        cls,
        operation: Operation,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        epilogue: Epilogue = NO_EPILOGUE,
        memory_format: torch.memory_format = torch.channels_last,
        precision: Precision = "fast",
    ) -> Problem:
        """One operation on tensors of one dtype."""
        two = epilogue.residual or operation is Pointwise.RELU_GRADIENT
        step = Step(operation, epilogue, (X, RESIDUAL) if two else (X,))
        return cls((step,), shape, Types.of(dtype), device, memory_format, precision)

    @property
    def dtype(self) -> torch.dtype | None:
        """The one dtype of inputs, weights and result; None where they differ."""
        source, weight, destination, _ = self.types
        return source if source == weight == destination else None

    def with_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem on tensors of another dtype."""
        return replace(self, types=Types.of(dtype))

    @property
    def kind(self) -> Kind:
        if len(self.steps) > 1:
            return Kind.PROGRAM
        operation = self.steps[0].operation
        if isinstance(operation, Conv) and operation.dims != 2:
            return Kind.CONVOLUTION_ND
        return _KINDS[operation if isinstance(operation, Pointwise) else type(operation)]

    @property
    def epilogue(self) -> Epilogue:
        """The last step's."""
        return self.steps[-1].epilogue

    @property
    def convs(self) -> tuple[Conv, ...]:
        """The steps' convolutions."""
        return tuple(step.operation for step in self.steps if isinstance(step.operation, Conv))

    @property
    def conv(self) -> Conv:
        """The convolution of a problem of one."""
        (conv,) = self.convs
        return conv

    @property
    def reads_residual(self) -> bool:
        """Whether it has a second input."""
        return any(RESIDUAL in step.reads for step in self.steps)

    @property
    def more(self) -> list[Shape]:
        """Shapes of its inputs beyond x and the residual."""
        first, (n, _, *size) = self.steps[0], self.shape
        concatenated = first.operation.channels[1:] if isinstance(first.operation, Affine) else ()
        gate = [(*first.result_shape(self.shape)[:2], *[1] * len(size))] if first.epilogue.gate else []
        return [*((n, channels, *size) for channels in concatenated), *gate]

    def shapes(self) -> list[Shape]:
        """Shapes of the values, by their numbers. A residual has the shape of the sums that it is added to."""
        found = [self.shape, self.shape, *self.more]
        for step in self.steps:
            if RESIDUAL in step.reads[1:]:
                found[RESIDUAL] = step._replace(epilogue=step.epilogue._replace(pool=None)).result_shape(found[step.reads[0]])
            found.append(step.result_shape(found[step.reads[0]]))
        return found

    def output_shape(self) -> Shape:
        return self.shapes()[-1]

    def block(self) -> Block | None:
        """The steps as a residual block, whose shortcut may have no bias; None if they are none."""
        return _block(self.steps)

    def tf32_allowed(self) -> bool:
        """Whether TF32 may be used now: by torch.backends.cudnn.conv.fp32_precision, and not with precision="direct"."""
        setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return self.dtype == torch.float32 and self.precision == "fast" and setting == "tf32"

    @property
    def label(self) -> str:
        """What it computes, in the public ops' words; for people only."""
        return label(self.steps)

    def __str__(self) -> str:
        convs = ", ".join(f"{c.in_channels}→{c.out_channels} {'×'.join(map(str, c.kernel))}/{c.stride[0]}" for c in self.convs)
        shape, dtype = "×".join(map(str, self.shape)), str(self.types.source).removeprefix("torch.")
        return f"{self.label}({shape} {dtype} on {self.device}; {convs})"


def _block(steps: tuple[Step, ...]) -> Block | None:
    convs = tuple(step.operation for step in steps if isinstance(step.operation, Conv))
    if len(steps) < 2 or len(convs) < len(steps) or len(steps[-1].reads) < 2:
        return None
    projected = len(steps) > 2 and steps[-1].reads[1] == FIRST_RESULT
    found = Block(convs[projected:], convs[0] if projected else None)
    if projected:
        steps = (steps[0]._replace(epilogue=steps[0].epilogue._replace(bias=True)), *steps[1:])
    return found if steps == residual_block(*found) else None


def label(steps: tuple[Step, ...]) -> str:
    """What steps compute, in the public ops' words; for people only."""
    block = _block(steps)
    if block is not None and len(block.main) in (2, 3):
        return "basic_block" if len(block.main) == 2 else "bottleneck"
    return " → ".join(map(_label, steps))


def _label(step: Step) -> str:
    operation, epilogue = step.operation, step.epilogue
    tail = ("_gate" if epilogue.gate else "") + ("_add" if epilogue.residual else "")
    if epilogue.activation is not Activation.NONE:
        tail += f"_{epilogue.activation.value}"
    if isinstance(operation, Conv):
        if epilogue.pool is not None and tail == "_relu":
            return "stem"
        return f"conv{operation.dims}d{'_bn' if epilogue.bias else ''}{tail}{'_pool' if epilogue.pool is not None else ''}"
    if isinstance(operation, TrainingConv):
        return "conv2d"
    if isinstance(operation, Linear):
        return f"linear{tail}"
    if isinstance(operation, Affine):
        return f"{'cat_' if len(operation.channels) > 1 else ''}affine{tail}"
    if operation is Pointwise.IDENTITY:
        return "max_pool" if epilogue.pool is not None else tail.removeprefix("_")
    names = {
        Pointwise.BATCH_NORM: f"bn{tail}",
        Pointwise.RELU_GRADIENT: "add_relu_backward",
        Pointwise.AVERAGE_POOL: "average_pool",
    }
    return names[operation]


def _sizes(values: Sequence[int]) -> Sizes:
    return tuple(map(int, values))
