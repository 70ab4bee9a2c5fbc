"""What all ops share: registration with torch.library, the run of an op on bound kernels, and formulas of derivatives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import config
from resnet_fused.backends import STOCK, ConvParameters, Declined, Kernel, Problem, Step, choice, choosing, stock
from resnet_fused.backends.binding import bind
from resnet_fused.backends.problem import Types
from resnet_fused.ops import checks
from resnet_fused.ops.flops import count_as
from resnet_fused.runtime.calls import call_key, choice_without_strides, memory_format
from resnet_fused.runtime.kept import Kept, Unservable

LIBRARY = torch.library.Library("resnet_fused", "DEF")


def register(schema: str, eager: Callable[..., Any], fake: Callable[..., Any], stock: Callable[..., Any] | None = None) -> None:
    """Defines resnet_fused::`schema` with its eager implementation on all devices and its fake one.

    `stock`: the same in stock's operators, by which floating-point operations are counted; None where those count as none.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=LIBRARY)
    if stock is not None:
        count_as(name, stock)


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
        if choice() == ctx.chosen:
            return backward(ctx, *grads)
        with choosing(ctx.chosen):
            return backward(ctx, *grads)

    return setup, run


class Runner:
    """Runs steps on one set of parameters, those of calls that come as an operator, without a module.

    A kernel is bound for each kind of input and kept, as long as the parameters are as they were (`Kept`).
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self._kept: Kept[Kernel] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """The result. Weights and biases are in the order of the steps."""
        kernel = self._kernel(x, residual, weights, biases, choice())
        try:
            return kernel(x, residual)
        except Declined:
            return self._kernel(x, residual, weights, biases, STOCK)(x, residual)

    def _kernel(
        self, x: Tensor, residual: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor], chosen: str
    ) -> Kernel:
        if x.layout is not torch.strided:
            return self._bind(choice_without_strides(chosen), x, weights, ConvParameters(tuple(weights), tuple(biases)))
        tensors = (*weights, *biases)
        kept = self._kept
        try:
            if kept is None or not kept.holds(tensors):
                kept = self._kept = Kept(tensors)
        except Unservable:
            # Parameters made under inference_mode don't count their changes: nothing about them can be kept.
            _warn_of_inference_tensors()
            return self._bind(STOCK, x, weights, ConvParameters(tuple(weights), tuple(biases)))
        key = call_key(x, residual, chosen)
        kernel = kept.get(key)
        if kernel is None:
            checks.check(self._problem(x, weights), x, residual, weights)
            count = len(weights)
            parameters = kept.once(lambda aliases: ConvParameters(aliases[:count], aliases[count:]))
            kernel = kept.put(key, self._bind(chosen, x, weights, parameters))
        return kernel

    def _bind(self, chosen: str, x: Tensor, weights: Sequence[Tensor], parameters: ConvParameters) -> Kernel:
        return bind(self._problem(x, weights), parameters, chosen).kernel

    def _problem(self, x: Tensor, weights: Sequence[Tensor]) -> Problem:
        """The problem that an input like x poses."""
        checks.check_dims("x", x, 4, "(N, C, H, W)")
        n, c, h, w = x.shape
        return Problem(self.steps, (n, c, h, w), Types.of(x.dtype), x.device, memory_format(x, *weights))


@functools.cache
def _warn_of_inference_tensors() -> None:
    config.logger().warning(
        "The parameters of a fused op were made under torch.inference_mode, where changes can't be noticed, so stock ops run "
        "instead of packed kernels. Create or load the model outside of inference_mode; calling it inside is fine."
    )


# By the identity of a weight: a reference that tells whether it still lives, and its runners by what they compute.
_runners: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, Runner]]] = {}


def runner_for(weight: Tensor, what: Hashable, steps: Callable[[], tuple[Step, ...]]) -> Runner:
    """The runner of an op's calls with that first weight: kept as long as the weight lives.

    Args:
        what: what it computes, and the weight's shape: another runner for each. Cheaper to make than the steps.
        steps: gives the steps.
    """
    number = id(weight)
    found = _runners.get(number)
    if found is None or found[0]() is not weight:
        # Where a weight is gone another one may have its number, before the other's runners were dropped.
        reference = weakref.ref(weight, lambda dead: _drop(number, dead))
        found = _runners[number] = reference, {}
    runner = found[1].get(what)
    if runner is None:
        runner = found[1].setdefault(what, Runner(steps()))
    return runner


def _drop(number: int, dead: weakref.ref[Tensor]) -> None:
    found = _runners.get(number)
    if found is not None and found[0] is dead:
        _runners.pop(number, None)


def stock_result(
    steps: tuple[Step, ...],
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """The steps on stock PyTorch, for calls that are `stock_only`; arguments as a `Runner`'s."""
    n, c, h, w = x.shape
    problem = Problem(steps, (n, c, h, w), Types.of(x.dtype), x.device)
    return stock().prepare(problem, ConvParameters(tuple(weights), tuple(biases)))(x, residual)


def update_statistics(running: Tensor | None, new: Tensor, share: float | Tensor) -> None:
    """Moves a running statistic of a batch norm towards the batch's, in place: running += share · (new − running).

    For calls under no_grad.
    """
    if running is None:
        return
    if new.dtype != running.dtype:
        new = new.to(running.dtype)
    running.lerp_(new, share.to(running.dtype) if isinstance(share, Tensor) else share)


def empty_result(problem_shape: Sequence[Any], like: Tensor, format: torch.memory_format) -> Tensor:
    """An uninitialised result, for fake implementations."""
    return like.new_empty(tuple(problem_shape)).contiguous(memory_format=format)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of conv2d(x, weight) + bias by x, weight and bias, each None where not needed.

    `geometry` holds stride, padding, dilation (two integers each) and groups.
    """
    stride, padding, dilation, groups = geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needed)
    )


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient of relu by its input, from its result: grad where y > 0, and where y is NaN, as stock PyTorch has it."""
    return torch.ops.aten.threshold_backward(grad, y, 0)
