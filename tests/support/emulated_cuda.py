"""Runs ops of the CUDA backend on CPU tensors: the launches that the library plans, executed from the kernels' PTX."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ptx_executor as px
import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Problem
from resnet_fused.backends.cuda import block as cuda_block
from resnet_fused.backends.cuda import stem as cuda_stem
from resnet_fused.backends.cuda.convolution import pack_weight, plan_problem
from resnet_fused.backends.problem import Conv
from support.problems import problem_of

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# In order of csrc/cuda/plan.h's DeviceProperties: an A100, an RTX 4090, an H100 and a T4.
A100 = [80, 108, 163 << 10, 164 << 10]
RTX4090, H100 = [89, 128, 99 << 10, 100 << 10], [90, 132, 227 << 10, 228 << 10]
T4 = [75, 40, 64 << 10, 64 << 10]
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class Result(NamedTuple):
    """What an op gave, and what each of its launches did."""

    y: Tensor
    kernels: list[str]
    counters: list[px.Counters]


@functools.cache
def ptx(source: str, arch: str) -> str:
    """PTX of one of csrc/cuda's .cu files."""
    return px.compile_ptx(SOURCES / f"{source}.cu", arch, ["-lineinfo"])


@functools.cache
def module(source: str, arch: str) -> px.Module:
    return px.Module(ptx(source, arch))


def source_of(kernel: str) -> str:
    """The .cu file that a kernel is in."""
    if kernel.startswith("bottleneck"):
        return f"block_{kernel.split('_')[2]}"
    if kernel.startswith("stem"):
        return "stem"
    if not kernel.startswith("conv2d"):
        return "batch_norm"
    for part in ("stem", "reduce"):
        if part in kernel:
            return f"conv2d_{part}"
    return f"conv2d_{kernel.split('_')[2].replace('tf32', 'f32')}"


def launch(plan: tuple, memory: px.Memory, device: Sequence[int]) -> tuple[list[str], list[px.Counters]]:
    """Executes a plan of the library, as resnet_fused_cuda::*_plan gives it."""
    kernels, launches, params, _ = plan
    struct, counters = np.array(params, np.int64).tobytes(), []
    for i, kernel in enumerate(kernels):
        *grid, block, shared = launches[5 * i : 5 * i + 5]
        found = module(source_of(kernel), f"sm_{device[0]}")
        counters.append(found.launch(kernel, grid, block, [struct], shared, memory))
    return kernels, counters


def nhwc(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).contiguous()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "relu",
    slope: float = 0.0,
    tf32: bool = False,
    device: Sequence[int] = A100,
    kernel: str = "",
    splits: int = 0,
) -> Result:
    """activation(conv2d(x, weight) + bias + residual) by the CUDA backend's kernels; `kernel`, `splits` as in plan_conv2d."""
    conv = Conv.of(weight, stride, padding, dilation, 1)
    problem = problem_of("conv2d_bn", tuple(x.shape), x.dtype, x.device, (conv,))
    numbers = plan_problem(problem, tf32)
    packed = pack_weight(weight, torch.ops.resnet_fused_cuda.conv2d_weight_layout(numbers), tf32)
    shape, function = problem.output_shape(), (activation, slope)
    return conv2d_packed(x, packed, bias.float(), residual, numbers, shape, function, device, kernel, splits)


def conv2d_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    numbers: list[int],
    shape: tuple[int, int, int, int],
    function: tuple[str, float],
    device: Sequence[int] = A100,
    kernel: str = "",
    splits: int = 0,
) -> Result:
    """The same with a packed weight; `numbers`: the problem as the planner takes it, `shape`: of the result."""
    ops, memory = torch.ops.resnet_fused_cuda, px.Memory()
    n, k, p, q = shape
    pointers = [memory.upload(nhwc(x)), memory.upload(weight), memory.upload(bias)]
    pointers += [0 if residual is None else memory.upload(nhwc(residual))]
    pointers += [memory.empty(n * p * q * k * x.element_size()), 0]
    workspace = ops.conv2d_plan(numbers, device, pointers, *function, kernel, splits)[3]
    if workspace:
        pointers[5] = memory.empty(workspace)
    kernels, counters = launch(ops.conv2d_plan(numbers, device, pointers, *function, kernel, splits), memory, device)
    y = memory.download(pointers[4], x.dtype, (n, p, q, k))
    return Result(y.permute(0, 3, 1, 2), kernels, counters)


def block(problem: Problem, x: Tensor, parameters: ConvParameters, device: Sequence[int] = A100, kernel: str = "") -> Result:
    """A whole residual block by the CUDA backend's kernels; `kernel` as in plan_block."""
    weight, bias = cuda_block.pack(*parameters.tensors())
    return block_packed(problem, x, weight, bias, device, kernel)


def block_packed(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor, device: Sequence[int] = A100, kernel: str = ""
) -> Result:
    """The same with packed parameters."""
    memory, (n, c, h, w) = px.Memory(), problem.output_shape()
    pointers = [memory.upload(t) for t in (nhwc(x), weight, bias)] + [memory.empty(n * c * h * w * x.element_size())]
    plan = torch.ops.resnet_fused_cuda.block_plan(cuda_block.plan_problem(problem), device, pointers, kernel)
    kernels, counters = launch(plan, memory, device)
    return Result(memory.download(pointers[3], x.dtype, (n, h, w, c)).permute(0, 3, 1, 2), kernels, counters)


def stem(problem: Problem, x: Tensor, parameters: ConvParameters, device: Sequence[int] = A100, rows: int = 0) -> Result:
    """The stem with its pool by the CUDA backend's kernels, on x in its own strides; `rows` as in plan_stem."""
    (weight,), (bias,) = parameters.tensors()
    return stem_packed(problem, x, cuda_stem.pack_weight(weight), bias.float(), device, rows)


def stem_packed(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor, device: Sequence[int] = A100, rows: int = 0
) -> Result:
    """The same with packed parameters."""
    memory, (n, c, h, w) = px.Memory(), problem.output_shape()
    pointers = [memory.upload(t) for t in (x, weight, bias)] + [memory.empty(n * c * h * w * x.element_size())]
    plan = torch.ops.resnet_fused_cuda.stem_plan(cuda_stem.plan_problem(problem), x.stride(), device, pointers, rows)
    kernels, counters = launch(plan, memory, device)
    return Result(memory.download(pointers[3], x.dtype, (n, h, w, c)).permute(0, 3, 1, 2), kernels, counters)


def add_relu(a: Tensor, b: Tensor, device: Sequence[int] = A100, *, backward: bool = False) -> Result:
    """relu(x + residual) of x and residual, or its gradient, of dy and y."""
    memory = px.Memory()
    out = memory.empty(a.numel() * a.element_size())
    pointers = [memory.upload(a), memory.upload(b), out]
    plan = torch.ops.resnet_fused_cuda.add_relu_plan(backward, a.numel(), ELEMENTS[a.dtype], device, pointers)
    kernels, counters = launch(plan, memory, device)
    return Result(memory.download(out, a.dtype, tuple(a.shape)), kernels, counters)


class Norm:
    """Batch norm's passes, with the signatures of resnet_fused.backends.norm.NormKernels. `counters`: of the last pass."""

    def __init__(self, device: Sequence[int] = A100) -> None:
        self.device, self.counters = device, []

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, first, second = self._run(0, x, x=x)
        return first, second

    def apply(self, x, residual, mean, var, weight, bias, eps, relu):
        return self.activated(x, residual, mean, var, weight, bias, eps, "relu" if relu else "none")

    def activated(self, x, residual, mean, var, weight, bias, eps, activation, slope=0.0):
        """The pass `apply` with any function after it."""
        given = {"residual": residual, "mean": mean, "var": var, "weight": weight, "bias": bias}
        return self._run(1, x, x=x, eps=eps, function=(activation, slope), out=True, **given)[0]

    def backward_reduce(self, dy, x, y, mean, var, eps, keep_masked):
        _, masked, first, second = self._run(2, dy, dy=dy, x=x, y=y, mean=mean, var=var, eps=eps, masked=keep_masked)
        return first, second, masked

    def backward_apply(self, dy, x, y, mean, var, weight, sums, eps, keep_masked):
        dweight, dbias, count = (None, None, 0.0) if sums is None else sums
        given = {"y": y, "mean": mean, "var": var, "weight": weight, "dweight": dweight, "dbias": dbias}
        x = x if sums is not None else None
        inverse = 1 / count if count else 0.0
        return self._run(3, dy, dy=dy, x=x, eps=eps, inverse=inverse, out=True, masked=keep_masked, **given)[:2]

    def _run(self, number, like, *, eps=0.0, inverse=0.0, function=("none", 0.0), out=False, masked=False, **given):
        memory, channels = px.Memory(), like.shape[1]
        rows, size = like.numel() // channels, like.numel() * like.element_size()

        def upload(name: str) -> int:
            t = given.get(name)
            return 0 if t is None else memory.upload(nhwc(t) if t.dim() == 4 else t)

        pointers = [upload(name) for name in ("x", "residual", "dy", "y")]
        pointers += [memory.empty(size) if out else 0, memory.empty(size) if masked else 0]
        pointers += [upload(name) for name in ("mean", "var", "weight", "bias", "dweight", "dbias")]
        sums = number in (0, 2)
        pointers += [0, *(memory.empty(channels * 4) if sums else 0 for _ in range(2))]
        arguments = number, rows, channels, ELEMENTS[like.dtype], self.device
        plan = torch.ops.resnet_fused_cuda.batch_norm_plan
        workspace = plan(*arguments, pointers, eps, inverse, *function)[3]
        if workspace:
            pointers[12] = memory.empty(workspace)
        _, self.counters = launch(plan(*arguments, pointers, eps, inverse, *function), memory, self.device)

        def activation(wanted: bool, pointer: int) -> Tensor | None:
            n, c, h, w = like.shape
            return memory.download(pointer, like.dtype, (n, h, w, c)).permute(0, 3, 1, 2) if wanted else None

        first, second = (memory.download(p, torch.float32, (channels,)) if sums else None for p in pointers[13:15])
        return activation(out, pointers[4]), activation(masked, pointers[5]), first, second
