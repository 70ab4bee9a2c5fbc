"""cuDNN's convolutions, and what follows them: fused by cuDNN, or in one pass of ours over the result.

The variant "fused" is convolution, bias, residual and ReLU as one operation, through PyTorch's aten::cudnn_convolution_relu and
aten::cudnn_convolution_add_relu. "pass" is stock's convolution, then a kernel of csrc/cuda that adds shift and residual and
applies ReLU: each element is read and written once, where stock's ops take up to three turns. Known limits of the former, each
checked:

* There is no convolution with bias alone, so that conv2d_bn is served by a pass only.
* Some shapes have no fused engine, which is known only when it is run: a problem is run when it is prepared.
* cuDNN's ReLU may turn NaN into 0, where stock PyTorch keeps it, and PyTorch passes uninitialised memory as a residual
  with the factor 0. What an engine makes of both depends on the engine, so each problem is run on an input with a NaN, and
  its memory is full of NaN.
* A residual that is the input itself failed before cuDNN 8.3 (pytorch/pytorch issue 62926).
* TF32 follows torch.backends.cudnn, and nothing else, so precision="exact" is served only where that forbids it.
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
from resnet_fused.backends import BackendError, Kernel, get, records
from resnet_fused.backends.cuda import aligned
from resnet_fused.backends.problem import Folded, Problem

_OLDEST_CUDNN = 8300
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OPS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
_FUSED, _PASS = "fused", "pass"
_FUSED_OPS = _OPS[1:]


class CuDNN:
    """cuDNN's fused convolution operations, for CUDA tensors."""

    name = "cudnn"
    asks_for_gpu = True

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no GPU (torch.cuda.is_available() is False)"
        if torch.version.hip is not None:
            return "this PyTorch was built for AMD GPUs, which have no cuDNN"
        if not torch.backends.cudnn.is_available():
            return "this PyTorch was built without cuDNN; install a build with it"
        version = torch.backends.cudnn.version() or 0
        if version < _OLDEST_CUDNN:
            return f"cuDNN {version} fails for a residual that is the input; install 8.3 or newer"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.op not in ("conv2d", *_OPS):
            return f"cuDNN has no operation for {problem.op}"
        if problem.device.type != "cuda":
            return f"it serves cuda tensors, not {problem.device.type}"
        if problem.dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {problem.dtype}"
        if problem.op not in ("conv2d", *_FUSED_OPS) and (missing := _pass_missing(problem)) is not None:
            return f"cuDNN has no fused operation for {problem.op}, and there is no pass for it: {missing}"
        if not torch.backends.cudnn.enabled:
            return "torch.backends.cudnn.enabled is False"
        if problem.precision == "exact" and replace(problem, precision="fast").tf32_allowed():
            return "precision is 'exact', and torch.backends.cudnn.conv.fp32_precision is 'tf32'; set it to 'ieee'"
        n, c, h, w = problem.shape
        result = torch.Size(problem.output_shape()).numel()
        if result == 0:
            return "the input or the result is empty"
        if max(n * c * h * w, result) >= 2**31:
            return "a tensor has 2^31 elements or more, and cuDNN's fused convolution indexes by 32 bits"
        if torch.cuda.is_current_stream_capturing():
            return "the stream is being captured, and a problem must be tried before; run it once without capture"
        return None

    def wins(self, problem: Problem) -> bool:
        # Where no trial was made. On an H200 in half precision each layer of a ResNet-50, without the stem, took 0.20 to 0.85
        # of the time of stock's ops (batch 1, 32 and 256).
        if problem.op == "conv2d":
            return True  # it is stock's convolution, with the engine that `prepare` found
        if problem.op not in _FUSED_OPS:
            return False  # a pass, as stock's bias
        return self._fusing_was_faster(problem) or _pass_missing(problem) is None  # a pass is one turn where stock takes two

    def _fusing_was_faster(self, problem: Problem) -> bool:
        (conv,) = problem.convs
        half = problem.dtype in (torch.float16, torch.bfloat16)
        return half and conv.groups == 1 and conv.in_channels % 8 == 0 and _measured(problem.device)

    def variants(self, problem: Problem) -> list[str]:
        """Names of the ways to compute it, which `prepare` takes, the most promising first; empty where there is no choice."""
        if problem.op == "conv2d":
            return []
        found = [_FUSED] if problem.op in _FUSED_OPS else []
        if _pass_missing(problem) is None:
            found.append(_PASS)
        return found if self._fusing_was_faster(problem) else found[::-1]

    def prepare(self, problem: Problem, folded: Folded, variant: str | None = None) -> Kernel:
        """The kernel for the problem. Each thread runs it on zeros and a NaN before, so that cuDNN times its engines.

        Args:
            variant: one of `variants`; None: the recorded one, or the first that is right.

        Raises:
            BackendError: cuDNN has no engine for it, or one that loses a NaN or makes one.
        """
        if problem.op == "conv2d":
            return _on_each_thread(get("reference").prepare(problem, folded), problem, folded)
        known, named = self.variants(problem), variant or records.variant(problem, self.name)
        names = [named] if named in known else known
        for name in names[:-1]:
            with contextlib.suppress(BackendError):
                return self._by(name, problem, folded)
        return self._by(names[-1], problem, folded)

    def _by(self, name: str, problem: Problem, folded: Folded) -> Kernel:
        return _on_each_thread((self._fused if name == _FUSED else self._with_a_pass)(problem, folded), problem, folded)

    def _with_a_pass(self, problem: Problem, folded: Folded) -> Kernel:
        conv = get("reference").prepare(replace(problem, op="conv2d"), folded)
        relu, channels = problem.op != "conv2d_bn", problem.convs[0].out_channels

        def pack() -> tuple[Tensor, Tensor, Tensor]:
            shift = folded.shifts[0].detach().float().contiguous().clone()
            return shift, shift.new_zeros(channels), shift.new_ones(channels)

        # A batch norm with the mean 0 and the variance 1, whose bias is the shift.
        shift, mean, var = folded.pack(("cudnn", "pass"), pack)
        apply = torch.ops.resnet_fused_cuda.bn_apply_fwd.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            y = conv(x, None).contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = aligned(residual.contiguous(memory_format=torch.channels_last))
            return apply(y, residual, mean, var, None, shift, 0.0, relu)

        return kernel

    def _fused(self, problem: Problem, folded: Folded) -> Kernel:
        (conv,) = problem.convs
        format = problem.memory_format
        key = ("cudnn", format)

        def pack() -> tuple[Tensor, Tensor]:
            (weight,), (shift,) = folded.tensors()
            return weight.detach().contiguous(memory_format=format), shift.detach()

        weight, shift = folded.pack(key, pack)
        geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x.contiguous(memory_format=format)
            if residual is None:
                return torch.ops.aten.cudnn_convolution_relu(x, weight, shift, *geometry)
            residual = residual.contiguous(memory_format=format)
            return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *geometry)

        return kernel


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
def _measured(device: torch.device) -> bool:
    """Whether the device is of the architecture that `wins` was measured on."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _on_each_thread(kernel: Kernel, problem: Problem, folded: Folded) -> Kernel:
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
            own = of_thread.kernel = _tried_or_stock(kernel, problem, folded)
        return own(x, residual)

    _try(kernel, problem, folded)
    of_thread.kernel = kernel
    return on_its_thread


def _pass_missing(problem: Problem) -> str | None:
    """Why there is no pass over the problem's result; None if there is one."""
    if problem.memory_format != torch.channels_last:
        return "it goes over channels_last tensors"
    passes = get("cuda")
    result = Problem("bn_relu", problem.output_shape(), problem.dtype, problem.device)
    return passes.unavailable() or passes.unsupported(result)


def _try(kernel: Kernel, problem: Problem, folded: Folded) -> None:
    """Lets cuDNN choose an engine for this thread, and looks what it makes of NaN.

    Raises:
        BackendError: there is none, or it isn't right.
    """
    x = torch.zeros(problem.shape, dtype=problem.dtype, device=problem.device)
    residual = x.new_zeros(problem.output_shape()) if problem.op == "conv2d_bn_add_relu" else None
    x[problem.shape[0] // 2, :, problem.shape[2] // 2, problem.shape[3] // 2] = torch.nan
    try:
        with torch.no_grad(), _benchmark():
            kernel(x, residual)
        fault = None if problem.op == "conv2d" else _fault_of_nan(kernel, problem, folded, x, residual)
    except RuntimeError as error:
        reason = f"cuDNN has no fused engine for {problem}: {error}. Choose another backend, or 'auto'."
        raise BackendError(reason) from error
    if fault is not None:
        raise BackendError(f"cuDNN's fused engine for {problem} {fault}. Choose another backend, or 'auto'.")


def _tried_or_stock(kernel: Kernel, problem: Problem, folded: Folded) -> Kernel:
    """The kernel, or stock's where it isn't right on this thread."""
    try:
        _try(kernel, problem, folded)
    except BackendError as error:
        config.logger().warning("stock's convolution serves on a thread: %s", error)
        return get("reference").prepare(problem, folded)
    return kernel


@torch.no_grad()
def _fault_of_nan(kernel: Kernel, problem: Problem, folded: Folded, x: Tensor, residual: Tensor | None) -> str | None:
    """What an engine does wrong with the NaN in x, which fill all channels of a pixel; None if nothing."""
    # The result is likely to be allocated where this was.
    poison = torch.full(problem.output_shape(), torch.nan, dtype=x.dtype, device=x.device)
    del poison
    y = kernel(x, residual)
    (conv,) = problem.convs
    # One channel tells whose windows have the NaN.
    ones = x.new_ones((1, 1, *conv.kernel), dtype=torch.float32)
    expected = F.conv2d(x[:, :1].isnan().float(), ones, None, conv.stride, conv.padding, conv.dilation) > 0
    if not bool((y.isnan() | ~expected).all()):
        return "turns NaN into a number"
    if bool((y.isnan() & ~expected).any()):
        # Stock's algorithm may spread a NaN as well, as Winograd's do over a tile.
        stock = get("reference").prepare(problem, folded)(x, residual)
        if bool((y.isnan() & ~stock.isnan()).any()):
            return "makes a NaN where stock has none"
    return None
