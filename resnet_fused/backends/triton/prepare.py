"""Prepared problems: what can be done before the tensors are known is done; a call allocates and launches."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from resnet_fused import config
from resnet_fused.backends import Conv, ConvParameters, Kernel
from resnet_fused.backends.problem import Pointwise, Problem
from resnet_fused.backends.tf32 import to_tf32
from resnet_fused.backends.triton import configs, conv2d, conv2d_depthwise, conv2d_grouped, conv2d_pairs, elementwise
from resnet_fused.backends.triton.launch import aligned, on


def plans(problem: Problem) -> list[str]:
    """Names of the plans that are worth a measurement for a convolution, the most promising first."""
    return [plan.name for plan in configs.promising(problem, configs.Chip.of(problem.device), problem.tf32_allowed())]


def depthwise_plans(problem: Problem) -> list[str]:
    """Those of the depthwise kernel."""
    return [strip.name for strip in conv2d_depthwise.plans(problem, configs.Chip.of(problem.device))]


def why_not_grouped(problem: Problem) -> str | None:
    """Why the kernel for groups can't serve a convolution now; None if it can."""
    return conv2d_grouped.why_not(problem, configs.Chip.of(problem.device), problem.tf32_allowed())


def grouped_plans(problem: Problem) -> list[str]:
    """Those of the kernel for groups."""
    return [tile.name for tile in conv2d_grouped.plans(problem, configs.Chip.of(problem.device))]


def module_of(plan: configs.Plan) -> ModuleType:
    """The module whose `pack`, `launches` and `bind` belong to a plan."""
    return conv2d_pairs if plan.walk == configs.PAIRS else conv2d


def pack(weight: Tensor, conv: Conv, plan: configs.Plan, precision: str) -> Tensor:
    """The weight as the plan's kernel reads it, which doesn't round it to TF32 itself."""
    packed = module_of(plan).pack(weight, conv, plan)
    return to_tf32(packed) if precision == "tf32" else packed


def convolution(problem: Problem, parameters: ConvParameters, plan: str | None, by: type[Conv2d] | None = None) -> Kernel:
    """The kernel for a convolution that the backend serves; `by` computes it, by default the implicit matrix product."""
    if problem.dtype == torch.bfloat16 and config.triton_interpreted():
        return _in_float32(convolution(problem.with_dtype(torch.float32), parameters.to(torch.float32), plan, by))
    with on(problem.device):
        return (by or ImplicitGemm)(problem, parameters, plan)


def elementwise_kernel(problem: Problem) -> Kernel:
    """The kernel for a sum with ReLU, or for the gradient of ReLU."""
    if problem.dtype == torch.bfloat16 and config.triton_interpreted():
        return _in_float32(elementwise_kernel(problem.with_dtype(torch.float32)))
    with on(problem.device):
        return Elementwise(problem)


def _in_float32(kernel: Kernel) -> Kernel:
    """A bfloat16 problem for Triton's interpreter, whose bfloat16 products and roundings are wrong (3.8)."""
    return lambda x, residual: kernel(x.float(), None if residual is None else residual.float()).bfloat16()


class _Prepared:
    """Calls `run` with the problem's device as the current one, because launches go to the current device."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.shape = problem.output_shape()
        self.device_index = problem.device.index if problem.device.type == "cuda" else None

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.device_index is not None and torch.cuda.current_device() != self.device_index:
            with on(x.device):
                return self.run(x, residual)
        return self.run(x, residual)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError


class Conv2d(_Prepared):
    """A convolution with bias, and with residual and ReLU where its epilogue has them."""

    def __init__(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> None:
        super().__init__(problem)
        self.parameters, self.plan = parameters, plan
        self.float32 = problem.types.source == torch.float32
        self.bias = parameters.pack(("triton", "bias"), lambda: aligned(parameters.biases[0].detach().contiguous()))
        # By whether TF32 is allowed, which may change from call to call.
        tf32 = problem.tf32_allowed()
        self.kernels: dict[bool, tuple[Callable[..., None], Tensor]] = {tf32: self.bind(tf32)}

    def bind(self, tf32: bool) -> tuple[Callable[..., None], Tensor]:
        """A function of (x, w, bias, residual, y), all channels_last and aligned, that fills y, and w."""
        raise NotImplementedError

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        tf32 = self.float32 and self.problem.tf32_allowed()
        if tf32 not in self.kernels:
            self.kernels[tf32] = self.bind(tf32)
        run, weight = self.kernels[tf32]
        y = torch.empty(self.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        x = aligned(x.contiguous(memory_format=torch.channels_last))
        if residual is not None:
            residual = aligned(residual.contiguous(memory_format=torch.channels_last))
        run(x, weight, self.bias, residual, y)
        return y if self.problem.memory_format == torch.channels_last else y.contiguous()


class ImplicitGemm(Conv2d):
    """By conv2d.py or conv2d_pairs.py."""

    def bind(self, tf32: bool) -> tuple[Callable[..., None], Tensor]:
        problem, conv = self.problem, self.problem.conv
        chip = configs.Chip.of(problem.device)
        plans = configs.plans(problem, chip, tf32)
        # A recorded name may be of the other TF32 setting's table; then the model chooses.
        plan = next((plan for plan in plans if plan.name == self.plan), plans[0])
        # Triton's interpreter has no TF32: what the tiles for it multiply there is float32.
        rounds = tf32 and not config.triton_interpreted()
        precision = chip.precision(rounds)
        key = ("triton", plan.walk, plan.block_k, precision)
        weight = self.parameters.pack(key, lambda: pack(self.parameters.weights[0], conv, plan, precision))
        return module_of(plan).bind(problem, plan, chip, rounds), weight


class Depthwise(Conv2d):
    """By conv2d_depthwise.py, which multiplies float32 as it is, whether TF32 is allowed or not."""

    def bind(self, tf32: bool) -> tuple[Callable[..., None], Tensor]:
        problem = self.problem
        strips = conv2d_depthwise.plans(problem, configs.Chip.of(problem.device))
        strip = next((strip for strip in strips if strip.name == self.plan), strips[0])
        weight = self.parameters.pack(("triton", "depthwise"), lambda: conv2d_depthwise.pack(self.parameters.weights[0]))
        return conv2d_depthwise.launch(problem, strip).bind(), weight


class Grouped(ImplicitGemm):
    """By conv2d_grouped.py, and as the class above where TF32 was allowed when this was made, and isn't now."""

    def bind(self, tf32: bool) -> tuple[Callable[..., None], Tensor]:
        problem, conv = self.problem, self.problem.conv
        chip = configs.Chip.of(problem.device)
        if conv2d_grouped.why_not(problem, chip, tf32) is not None:
            return super().bind(tf32)
        tiles = conv2d_grouped.plans(problem, chip)
        tile = next((tile for tile in tiles if tile.name == self.plan), tiles[0])
        rounds = tf32 and not config.triton_interpreted()
        precision = chip.precision(rounds)

        def pack() -> Tensor:
            packed = conv2d_grouped.pack(self.parameters.weights[0], conv, tile)
            return to_tf32(packed) if precision == "tf32" else packed

        weight = self.parameters.pack(("triton", "grouped", tile.merged, precision), pack)
        return conv2d_grouped.launch(problem, tile, chip, rounds).bind(), weight


class Elementwise(_Prepared):
    """relu(x + residual), or the gradient of relu, from the gradient by its result and the result."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        n, c, h, w = problem.shape
        gradient = problem.steps[0].operation is Pointwise.RELU_GRADIENT
        launch = elementwise.add_relu_bwd if gradient else elementwise.add_relu_fwd
        self.kernel = launch(n * c * h * w, problem.types.source).bind()

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        format = self.problem.memory_format
        y = torch.empty(self.shape, dtype=x.dtype, device=x.device, memory_format=format)
        self.kernel(aligned(x.contiguous(memory_format=format)), aligned(residual.contiguous(memory_format=format)), y)
        return y
