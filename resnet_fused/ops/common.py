"""What all ops share: registration with torch.library, the run of an op on bound kernels, and formulas of derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused import config
from resnet_fused.backends import Conv, Declined, Folded, Kernel, Pool, Precision, Problem, choice, choosing, get, records
from resnet_fused.backends.binding import bind
from resnet_fused.ops import checks
from resnet_fused.runtime.calls import MAX_KERNELS, call_key, choice_without_strides, memory_format, stamp

LIBRARY = torch.library.Library("resnet_fused", "DEF")


def register(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines resnet_fused::`schema` with its eager implementation on all devices and its fake one."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Defines the derivative of resnet_fused::`name`."""
    setup_context, backward = _with_choice(setup_context, backward)
    torch.library.register_autograd(f"resnet_fused::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def function(name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """An autograd.Function of what `register` and `register_autograd` take, for calls that are `plain`.

    Its forward sets up the context itself: where a Function has a setup_context, PyTorch inspects the signature of its forward
    at every call, for torch.func, whose calls aren't plain.
    """
    setup_context, backward = _with_choice(setup_context, backward)

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward_with_context), "backward": staticmethod(backward)}
    return type(f"{name}_function", (torch.autograd.Function,), members)


def _with_choice(
    setup_context: Callable[..., None], backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Both, so that backward chooses backends as forward did: on a GPU it runs on a thread that knows no `use_backend`."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.chosen = choice()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        with choosing(ctx.chosen):
            return backward(ctx, *grads)

    return setup, run


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
