"""cuDNN's convolutions: alone, with bias, residual and ReLU fused by cuDNN, or with one pass of ours after them.

Fused: through PyTorch's aten::cudnn_convolution_relu and aten::cudnn_convolution_add_relu. With a pass: stock's convolution,
then a kernel of csrc/cuda that adds bias and residual and applies the activation. It reads and writes each element once, where
stock's ops do it up to three times. Known limits of the former, each checked:

* There is no convolution with bias alone, so that it is served with a pass only.
* Some shapes have no fused engine, which is known only when it is run: a problem is run when it is prepared.
* cuDNN's ReLU may turn NaN into 0, where stock PyTorch keeps it, and PyTorch passes uninitialised memory as a residual
  with the factor 0. What an engine makes of both depends on the engine, so each problem is run on an input with a NaN, and
  its memory is full of NaN.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import config
from resnet_fused.backends import Activation, BackendError, ConvParameters, Epilogue, Implementation, Kernel, get, stock
from resnet_fused.backends.cuda.device import aligned
from resnet_fused.backends.problem import Kind, Pointwise, Problem


class Plain(Implementation):
    """A convolution without bias: stock's, with the engine that was found for it."""

    name = "plain"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        return None if problem.epilogue == _NOTHING else f"cuDNN has no operation for {problem.label}"

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        return _on_each_thread(_without_bias(problem, parameters), problem, parameters)


_NOTHING = Epilogue(bias=False)


class Fused(Implementation):
    """Bias, residual and ReLU by cuDNN itself. Each thread runs it before on zeros and a NaN, so that cuDNN times engines."""

    name = "fused"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        epilogue = problem.epilogue
        fits = epilogue.bias and epilogue.relu and epilogue.pool is None
        return None if fits else f"cuDNN has no fused operation for {problem.label}"

    def preferred(self, problem: Problem) -> bool:
        return fusing_was_faster(problem)

    def plans(self, problem: Problem) -> list[str]:
        return ["fused"]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        conv = problem.conv
        format = problem.memory_format
        key = ("cudnn", format)

        def pack() -> tuple[Tensor, Tensor]:
            (weight,), (bias,) = parameters.tensors()
            return weight.detach().contiguous(memory_format=format), bias.detach()

        weight, bias = parameters.pack(key, pack)
        geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=format)
            if residual is None:
                return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
            residual = residual.contiguous(memory_format=format)
            return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

        return _on_each_thread(kernel, problem, parameters)


class WithPass(Implementation):
    """The convolution as stock computes it, then one pass over its result."""

    name = "pass"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        if not problem.epilogue.bias or problem.epilogue.pool is not None:
            return f"cuDNN has no operation for {problem.label}"
        missing = why_no_pass(problem)
        if missing is None:
            return None
        return f"cuDNN has no fused operation for {problem.label}, and there is no pass for it: {missing}"

    def plans(self, problem: Problem) -> list[str]:
        return ["pass"]

    def prepare(self, problem: Problem, parameters: ConvParameters, plan: str | None) -> Kernel:
        conv = _without_bias(problem, parameters)
        function, channels = (problem.epilogue.activation.value, problem.epilogue.slope), problem.conv.out_channels

        def pack() -> tuple[Tensor, Tensor, Tensor]:
            bias = parameters.biases[0].detach().float().contiguous().clone()
            return bias, bias.new_zeros(channels), bias.new_ones(channels)

        # A batch norm with the mean 0 and the variance 1, whose bias is the bias.
        bias, mean, var = parameters.pack(("cudnn", "pass"), pack)
        apply = torch.ops.resnet_fused_cuda.bn_apply_fwd.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            y = conv(x, None).contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = aligned(residual.contiguous(memory_format=torch.channels_last))
            return apply(y, residual, mean, var, None, bias, 0.0, *function)

        return _on_each_thread(kernel, problem, parameters)


def _without_bias(problem: Problem, parameters: ConvParameters) -> Kernel:
    (step,) = problem.steps
    bare = replace(problem, steps=(step._replace(epilogue=_NOTHING, reads=step.reads[:1]),))
    return stock().prepare(bare, parameters)


def fusing_was_faster(problem: Problem) -> bool:
    """Whether cuDNN's fused operations were measured to be the fastest for such problems."""
    conv, half = problem.conv, problem.dtype in (torch.float16, torch.bfloat16)
    return half and conv.groups == 1 and conv.in_channels % 8 == 0 and was_measured(problem.device)


@contextlib.contextmanager
def _benchmark() -> Iterator[None]:
    """cuDNN times its engines for what runs within, and PyTorch keeps the fastest for later calls on this thread.

    On an H200 its heuristic choice took up to 1.7 times as long (64 → 256 channels with a residual, batch 256, half precision).
    """
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(before or config.trial())
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)


@functools.cache
def was_measured(device: torch.device) -> bool:
    """Whether the device is of the architecture that `preferred` was measured on."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _on_each_thread(kernel: Kernel, problem: Problem, parameters: ConvParameters) -> Kernel:
    """The kernel, tried on this thread now and on others when they first run it.

    Raises:
        BackendError: cuDNN has no engine on this thread, or one that isn't right.
    """
    # PyTorch keeps what cuDNN found for the thread that asked.
    of_thread = threading.local()

    def on_its_thread(x: Tensor, residual: Tensor | None) -> Tensor:
        try:
            own = of_thread.kernel
        except AttributeError:
            if torch.cuda.is_current_stream_capturing():
                return kernel(x, residual)
            own = of_thread.kernel = _tried_or_stock(kernel, problem, parameters)
        return own(x, residual)

    _try(kernel, problem, parameters)
    of_thread.kernel = kernel
    return on_its_thread


def why_no_pass(problem: Problem) -> str | None:
    """Why there is no pass over the problem's result; None if there is one."""
    if problem.memory_format != torch.channels_last:
        return "it goes over channels_last tensors"
    passes, dtype = get("cuda"), problem.dtype
    assert dtype is not None
    result = Problem.of(
        Pointwise.BATCH_NORM, problem.output_shape(), dtype, problem.device, Epilogue(activation=Activation.RELU)
    )
    return passes.unavailable() or passes.why_not(result)


def _try(kernel: Kernel, problem: Problem, parameters: ConvParameters) -> None:
    """Lets cuDNN choose an engine for this thread, and looks what it makes of NaN.

    Raises:
        BackendError: there is none, or it isn't right.
    """
    x = torch.zeros(problem.shape, dtype=problem.types.source, device=problem.device)
    residual = x.new_zeros(problem.output_shape()) if problem.epilogue.residual else None
    x[problem.shape[0] // 2, :, problem.shape[2] // 2, problem.shape[3] // 2] = torch.nan
    try:
        with torch.no_grad(), _benchmark():
            kernel(x, residual)
        fault = None if not problem.epilogue.bias else _fault_of_nan(kernel, problem, parameters, x, residual)
    except RuntimeError as error:
        reason = f"cuDNN has no fused engine for {problem}: {error}. Choose another backend, or 'auto'."
        raise BackendError(reason) from error
    if fault is not None:
        raise BackendError(f"cuDNN's fused engine for {problem} {fault}. Choose another backend, or 'auto'.")


def _tried_or_stock(kernel: Kernel, problem: Problem, parameters: ConvParameters) -> Kernel:
    """The kernel, or stock's where it isn't right on this thread."""
    try:
        _try(kernel, problem, parameters)
    except BackendError as error:
        config.logger().warning("stock's convolution serves on a thread: %s", error)
        return stock().prepare(problem, parameters)
    return kernel


@torch.no_grad()
def _fault_of_nan(
    kernel: Kernel, problem: Problem, parameters: ConvParameters, x: Tensor, residual: Tensor | None
) -> str | None:
    """What an engine does wrong with the NaN in x, which fill all channels of a pixel; None if nothing."""
    # The result is likely to be allocated where this was.
    poison = torch.full(problem.output_shape(), torch.nan, dtype=x.dtype, device=x.device)
    del poison
    y = kernel(x, residual)
    conv = problem.conv
    # One channel tells whose windows have the NaN.
    ones = x.new_ones((1, 1, *conv.kernel), dtype=torch.float32)
    expected = F.conv2d(x[:, :1].isnan().float(), ones, None, conv.stride, conv.padding, conv.dilation) > 0
    if not bool((y.isnan() | ~expected).all()):
        return "turns NaN into a number"
    if bool((y.isnan() & ~expected).any()):
        # Stock's algorithm may spread a NaN as well, as Winograd's do over a tile.
        theirs = stock().prepare(problem, parameters)(x, residual)
        if bool((y.isnan() & ~theirs.isnan()).any()):
            return "makes a NaN where stock has none"
    return None
