"""Replays a run as one CUDA graph where the host, which launches the kernels, takes longer than they do.

At small batch a GPU waits for Python: on an H200 a ResNet-50's kernels take 0.34 ms for one image, and launching them 1.9 ms.
After a few calls with one kind of input a run is timed; where it was the host that took the time, it is captured, and later
calls copy their inputs into the graph's own, replay it, and give copies of its results. Captured are only runs that draw no
random numbers and run no code of the model's own; the fast path's guards stand before a replay as before any other run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import config
from resnet_fused.backends.binding import overridden
from resnet_fused.runtime.calls import autocast_dtype
from resnet_fused.runtime.capture import Captured, overlaps

DEVICE = "cuda"
# Calls that a run serves before it is timed, and how often it is timed before it is left alone.
_CALLS, _TIMINGS = 2, 3
# Fewer operations aren't worth the copies.
FEWEST_OPERATIONS = 8
# The GPU took at most so many times as long as the host did: it waited for it.
_HOST_BOUND = 1.2

Values = list[Any]


def replayable(inputs: Sequence[Tensor], operations: int) -> bool:
    """Whether a run on such inputs may be captured later."""
    devices = {x.device for x in inputs}
    return (
        operations >= FEWEST_OPERATIONS
        and len(devices) == 1
        and inputs[0].device.type == DEVICE
        and torch.version.hip is None
        and not any(map(overlaps, inputs))
    )


class Replay:
    """A run's calls: eager ones at first, then replays of a graph, if that is faster.

    Args:
        run: gives all values of the run for its inputs.
        kept: numbers of the values that make up the result.
        held: tensors that calls read beside the inputs and what is packed. A graph holds as long as they lie where they lay.
    """

    def __init__(self, run: Callable[[Sequence[Tensor]], Values], kept: set[int], held: Sequence[Tensor]) -> None:
        self._run, self._kept, self._held = run, kept, [*held]
        self._lock = threading.Lock()
        self._calls = self._timings = 0
        self._pending: tuple[Any, Any, float] | None = None
        self._refused = False
        self.graph: _Graph | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> Values:
        if self._refused or overridden() or torch.cuda.is_current_stream_capturing():
            return self._run(inputs)
        graph = self.graph
        if graph is not None and graph.state == self._state():
            with self._lock:
                return graph(inputs)
        # While one thread times or captures, the others run eagerly.
        if not self._lock.acquire(blocking=False):
            return self._run(inputs)
        try:
            return self._eager(inputs)
        finally:
            self._lock.release()

    def _state(self) -> tuple[Any, ...]:
        """What a graph has fixed, and an eager run would ask for."""
        return (*map(Tensor.data_ptr, self._held), *current_settings(DEVICE))

    def _eager(self, inputs: Sequence[Tensor]) -> Values:
        if self.graph is not None:  # of another state
            self.graph = self._pending = None
            self._calls = self._timings = 0
        self._calls += 1
        if self._calls <= _CALLS:
            return self._run(inputs)
        if self._pending is None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(inputs[0].device)
            begin.record(stream)
            start = time.perf_counter()
            values = self._run(inputs)
            host = (time.perf_counter() - start) * 1e3
            end.record(stream)
            self._pending = begin, end, host
            return values
        begin, end, host = self._pending
        if not end.query():
            return self._run(inputs)  # the GPU hasn't come so far; the next call asks again
        self._pending, self._timings = None, self._timings + 1
        if begin.elapsed_time(end) <= _HOST_BOUND * host:
            return self._capture(inputs)
        self._refused = self._timings >= _TIMINGS
        return self._run(inputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Values:
        try:
            self.graph = _Graph(self._run, inputs, self._kept, self._state())
        except Exception as error:  # a function that waits for the GPU, say; the run is as it was
            self._refused = True
            config.logger().info("a model can't be replayed as a CUDA graph: %s: %s", type(error).__name__, error)
            return self._run(inputs)
        return self.graph(inputs)


class _Graph:
    """A captured run with its own inputs and results.

    Raises:
        RuntimeError: the run can't be captured.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Values],
        inputs: Sequence[Tensor],
        kept: set[int],
        state: tuple[Any, ...],
    ) -> None:
        self.state = state
        self._captured = Captured(run, inputs)
        # The run's other values are the graph's own business.
        values, self._captured.values = self._captured.values, None
        self._count = len(values)
        self._results = {number: values[number] for number in kept if number >= len(inputs)}
        self._given = {number for number in kept if number < len(inputs)}
        memory = [_memory(x) for x in (*self._captured.inputs, *self._results.values()) if isinstance(x, Tensor)]
        if len({*memory}) < len(memory):
            raise RuntimeError("results share memory with each other or with an input")

    def __call__(self, inputs: Sequence[Tensor]) -> Values:
        values: Values = [None] * self._count
        with self._captured.replayed(inputs):
            for number, value in self._results.items():
                values[number] = value.clone() if isinstance(value, Tensor) else value
        for number in self._given:
            values[number] = inputs[number]
        return values


def current_settings(device_type: str) -> tuple[Any, ...]:
    """Settings by which stock's ops choose their arithmetic when they are launched."""
    cudnn = torch.backends.cudnn
    return (
        cudnn.enabled,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        autocast_dtype(device_type),
    )


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
