"""What all ops share: registration with torch.library, the run of an op on bound kernels, and formulas of derivatives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused import config
from resnet_fused.backends import BackendError, Conv, Declined, Folded, Kernel, Pool, Precision, Problem, choice, get, records
from resnet_fused.backends.binding import bind
from resnet_fused.ops import checks

LIBRARY = torch.library.Library("resnet_fused", "DEF")

# More input shapes than this are unusual; kernels beyond it are dropped, and their packed weights stay for the others.
MAX_KERNELS = 64


def register(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines resnet_fused::`schema` with its eager implementation on all devices and its fake one."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Defines the derivative of resnet_fused::`name`."""
    torch.library.register_autograd(f"resnet_fused::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def function(name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """An autograd.Function of what `register` and `register_autograd` take, for calls that are `plain`.

    Its forward sets up the context itself: where a Function has a setup_context, PyTorch inspects the signature of its forward
    at every call, for torch.func, whose calls aren't plain.
    """

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward_with_context), "backward": staticmethod(backward)}
    return type(f"{name}_function", (torch.autograd.Function,), members)


def _vmapped() -> bool:
    """Whether torch.vmap is at work, perhaps outside of another transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in torch._C._functorch.get_interpreter_stack())


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Stock PyTorch's rule for a convolution's result: channels_last if the input or a weight is, else contiguous."""
    if _vmapped():
        return torch.contiguous_format  # tensors can't be asked for another
    # Tensors without strides have no format to ask for.
    channels_last = any(tensor.layout is torch.strided and suggests_channels_last(tensor) for tensor in tensors)
    return torch.channels_last if channels_last else torch.contiguous_format


def suggests_channels_last(x: Tensor) -> bool:
    """Whether stock PyTorch takes a tensor of four dimensions for channels_last, by its strides.

    Source: c10/core/MemoryFormat.h, is_channels_last_strides_2d.
    """
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        # The last is of tensors of one value an image, whose strides tell nothing.
        if (dim == 1 and stride == 0) or size == 0 or stride < smallest or (dim == 0 and smallest == x.stride(1)):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def choice_without_strides(chosen: str) -> str:
    """The backend for tensors in oneDNN's own layout (`x.to_mkldnn()`), which have no strides and run on stock ops alone.

    Raises:
        BackendError: another one was chosen explicitly.
    """
    if chosen not in ("auto", "reference"):
        raise BackendError(
            f"backend {chosen!r} can't serve tensors of layout torch._mkldnn, which only stock ops do. Pass x.to_dense(), or "
            "choose 'auto' or 'reference'."
        )
    return "reference"


_version = operator.attrgetter("_version")


def stamp(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Addresses and version counters: other ones when a tensor was changed in place, loaded, moved or cast.

    Raises:
        RuntimeError: a tensor was made under inference_mode and doesn't count its changes.
    """
    # By functions that loop in C: this stands before every call.
    return (*map(Tensor.data_ptr, tensors), *map(_version, tensors))


def call_key(x: Tensor, residual: Tensor | None, chosen: str) -> tuple[Any, ...]:
    """What the kernel of a call with strided tensors depends on, beside the op and its parameters."""
    other = None if residual is None else (residual.shape, residual.dtype)
    return x.shape, x.stride(), x.dtype, x.device, other, chosen, torch._C._get_mkldnn_enabled()


class _Bound(NamedTuple):
    """What a runner keeps for one state of its parameters and the records. Replaced as a whole: threads may share a runner."""

    stamp: tuple[int, ...]
    folded: Folded
    kernels: dict[tuple[Any, ...], Kernel]


class Runner:
    """Runs one op on one set of folded parameters.

    A kernel is bound for each kind of input and kept. All of it is dropped when a parameter was changed in place, loaded,
    moved or cast, seen by its address and version counter, and when `rf.tune` changed the records.

    Args:
        op, convs, shortcut, pool, precision: as in `Problem`.
        backend: name of the backend to use, or "auto".
        channels_last: whether results are channels_last always, instead of by stock's rule.
    """

    def __init__(
        self,
        op: str,
        convs: tuple[Conv, ...],
        shortcut: bool = False,
        pool: Pool | None = None,
        precision: Precision = "fast",
        backend: str = "auto",
        channels_last: bool = False,
    ) -> None:
        self.op, self.convs, self.shortcut, self.pool = op, convs, shortcut, pool
        self.precision, self.backend, self.channels_last = precision, backend, channels_last
        self.backends_used: dict[str, Problem] = {}
        self._bound: _Bound | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, weights: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
        try:
            return self.kernel(x, residual, weights, shifts)(x, residual)
        except Declined:
            return self.kernel(x, residual, weights, shifts, "reference")(x, residual)

    def kernel(
        self,
        x: Tensor,
        residual: Tensor | None,
        weights: Sequence[Tensor],
        shifts: Sequence[Tensor],
        chosen: str | None = None,
    ) -> Kernel:
        """The kernel that serves such tensors with these parameters; by the backend `chosen`, if not the runner's."""
        chosen = chosen or choice(self.backend)
        if x.layout is not torch.strided:
            return self._unkept(choice_without_strides(chosen), x, weights, shifts)
        try:
            now = (records.generation(), *stamp((*weights, *shifts)))
        except RuntimeError:
            # Parameters made under inference_mode don't count their changes: nothing about them can be kept.
            _warn_of_inference_tensors()
            return self._unkept("reference", x, weights, shifts)
        bound = self._bound
        if bound is None or bound.stamp != now:
            # Aliases, so that what is kept for a parameter doesn't keep the parameter itself alive.
            folded = Folded(tuple(w.detach() for w in weights), tuple(s.detach() for s in shifts))
            bound = self._bound = _Bound(now, folded, {})
            self.backends_used = {}
        key = call_key(x, residual, chosen)
        kernel = bound.kernels.get(key)
        if kernel is None:
            problem = self.problem(x, weights)
            checks.check(problem, x, residual, weights)
            kernel, backend = bind(problem, bound.folded, chosen)
            self.backends_used[backend] = problem
            while len(bound.kernels) >= MAX_KERNELS:
                bound.kernels.pop(next(iter(bound.kernels)), None)
            bound.kernels[key] = kernel
        return kernel

    def _unkept(self, backend: str, x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor]) -> Kernel:
        return bind(self.problem(x, weights), Folded(tuple(weights), tuple(shifts)), backend).kernel

    def problem(self, x: Tensor, weights: Sequence[Tensor]) -> Problem:
        """The problem that an input like x poses."""
        checks.check_dims("x", x, 4, "(N, C, H, W)")
        n, c, h, w = x.shape
        return Problem(
            self.op,
            (n, c, h, w),
            x.dtype,
            x.device,
            self.convs,
            self.shortcut,
            self.pool,
            torch.channels_last if self.channels_last else memory_format(x, *weights),
            self.precision,
        )

    def packed_bytes(self) -> int:
        """Bytes of what backends packed from the parameters."""
        return self._bound.folded.packed_bytes() if self._bound is not None else 0


@functools.cache
def _warn_of_inference_tensors() -> None:
    config.logger().warning(
        "The parameters of a fused op were made under torch.inference_mode, where changes can't be noticed, so stock ops run "
        "instead of packed kernels. Create or load the model outside of inference_mode; calling it inside is fine."
    )


_runners = WeakIdKeyDictionary()


def runner_for(weight: Tensor, *static: Any) -> Runner:
    """The runner of calls that come as an operator, without a module: kept as long as the first weight lives."""
    own: dict[tuple[Any, ...], Runner] = _runners.setdefault(weight, {})
    runner = own.get(static)
    if runner is None:
        runner = own.setdefault(static, Runner(*static))
    return runner


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but backward differentiation watches a call: eager, plain tensors.

    Otherwise it goes through the dispatcher, which knows tracing and subclasses, or is `stock_only`.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _transformed():
        return False
    if torch._C._is_tracing():  # by torch.jit.trace, which would note down kernels of this process
        return False
    # A loop, since a generator takes twice as long, and this stands before every call of every op.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a derivative by one of the tensors may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether a call may go to a backend's kernel directly: nothing watches it, not even autograd."""
    return plain(*tensors) and not needs_grad(*tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; under no_grad, too, which doesn't end them."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def stock_only() -> bool:
    """Whether a call needs rules that stock ops have and ours don't: torch.func's, forward-mode differentiation's, ONNX's."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return torch.onnx.is_in_onnx_export()
    return _transformed()


def stock(
    op: str,
    convs: tuple[Conv, ...],
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor] = (),
    shifts: Sequence[Tensor] = (),
    shortcut: bool = False,
    pool: Pool | None = None,
) -> Tensor:
    """The op on stock PyTorch, for calls that are `stock_only`; arguments as a `Runner`'s."""
    n, c, h, w = x.shape
    problem = Problem(op, (n, c, h, w), x.dtype, x.device, convs, shortcut, pool)
    return get("reference").prepare(problem, Folded(tuple(weights), tuple(shifts)))(x, residual)


def update_statistics(running: Tensor | None, new: Tensor, share: float | Tensor) -> None:
    """Moves a running statistic of a batch norm towards the batch's, in place: running += share · (new − running)."""
    if running is not None:
        with torch.no_grad():
            running.lerp_(new.to(running.dtype), share.to(running.dtype) if isinstance(share, Tensor) else share)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a type of device; None where it is off, or the device has none ("meta")."""
    # Asked first for any device, since the question for one takes as long as all else before a call.
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def empty_result(problem_shape: Sequence[Any], like: Tensor, format: torch.memory_format) -> Tensor:
    """An uninitialised result, for fake implementations."""
    return like.new_empty(tuple(problem_shape)).contiguous(memory_format=format)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of conv2d(x, weight) + shift by x, weight and shift, each None where not needed.

    `geometry` holds stride, padding, dilation (two integers each) and groups.
    """
    stride, padding, dilation, groups = geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needed)
    )


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient of relu by its input, from its result: grad where y > 0, and where y is NaN, as stock PyTorch has it."""
    return torch.ops.aten.threshold_backward(grad, y, 0)
