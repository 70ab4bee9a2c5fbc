"""A run captured as a CUDA graph: its own inputs, the stream and memory it is captured on, and replays.

Used by `rf.fuse(cuda_graph=True)`, for a whole model, and by `runtime.replay`, for the runs of a fast path.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# How PyTorch warns of a capture in which nothing was launched.
_EMPTY = "The CUDA Graph is empty"

# One capture at a time: they share a stream a device. Reentrant, since a run may hold another one that is captured by itself.
_captures = threading.RLock()


@functools.cache
def stream_of(device: torch.device) -> Any:
    """The stream that captures are made on; a graph's kernels belong to the device of its stream."""
    return torch.cuda.Stream(device)


class Captured:
    """A run with inputs of its own, captured on this thread after one run of the same kind there.

    Args:
        run: called with the graph's own inputs, twice: before the capture, so that workspaces and plans are there, and in it.
        inputs: of a call. Tensors are on one CUDA device, and copied; whatever else there is goes to `run` as it is.

    Attributes:
        inputs: the graph's own.
        values: what `run` gave in the capture. Its tensors are written by each replay.

    Raises:
        RuntimeError: the run can't be captured, changes an input in place, or launches nothing.
    """

    def __init__(self, run: Callable[[list[Any]], Any], inputs: Sequence[Any]) -> None:
        self._device = next(x.device for x in inputs if isinstance(x, Tensor))
        # Normal tensors, into which can be copied within inference mode and without.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [_copy(x) if isinstance(x, Tensor) else x for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with _captures, torch.cuda.device(self._device):
            self._stream = torch.cuda.current_stream(self._device)
            side = stream_of(self._device)
            side.wait_stream(self._stream)
            try:
                # Left by any exit: PyTorch's own context leaves its stream current where the end of a capture fails.
                with torch.cuda.stream(side), _without_autocast_cache():
                    versions = self._versions()
                    run(self.inputs)
                    if versions != self._versions():
                        raise RuntimeError("an input is changed in place")
                    self.values = self._capture(run, side)
            finally:
                self._stream.wait_stream(side)

    def _versions(self) -> list[int]:
        return [x._version for x in self.inputs if isinstance(x, Tensor)]

    def _capture(self, run: Callable[[list[Any]], Any], stream: Any) -> Any:
        pool = torch.cuda.graph_pool_handle()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                # Another thread's work may neither spoil the capture nor be spoilt by it.
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    values = run(self.inputs)
            except BaseException:
                close_pool(self._device, pool)
                raise
        for warning in warned:
            if _EMPTY in str(warning.message):
                raise RuntimeError("nothing is launched on the GPU")
        for warning in warned:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return values

    @contextlib.contextmanager
    def replayed(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Replays for the inputs of a call. Within the block, on the current stream, `values` are their results.

        One thread at a time.
        """
        if torch.cuda.current_device() == self._device.index:
            self._replay(inputs)
            yield
        else:
            with torch.cuda.device(self._device):
                self._replay(inputs)
                yield

    def _replay(self, inputs: Sequence[Any]) -> None:
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)  # where an earlier call may still be at work on the graph's tensors
            self._stream = stream
        for own, given in zip(self.inputs, inputs, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._graph.replay()


def _copy(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def close_pool(device: torch.device, pool: Any) -> None:
    """Ends the use of a failed capture's memory, which the end of the capture leaves open where it fails itself.

    While one is open the allocator gives no memory back on any stream.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # the capture had come to its end, or not to its beginning
    torch._C._cuda_releasePool(device.index, pool)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    # What autocast keeps of weights is freed when it ends, and a graph would read it after.
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)


def overlaps(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor, whose strides a copy can't have."""
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
