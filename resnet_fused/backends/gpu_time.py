"""Times of a GPU's work, without the host's: launches queue up before the GPU begins."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

# Clock cycles for which the GPU waits for launches: about a millisecond; and the longest wait in milliseconds.
_SLEEP, _LONGEST_SLEEP = 2_000_000, 50.0


def let_launches_queue(milliseconds: float = 1.0) -> None:
    """Lets the current stream wait for about so long, while the host launches what is to be timed, and the GPU needn't then."""
    torch.cuda._sleep(int(_SLEEP * min(max(milliseconds, 1.0), _LONGEST_SLEEP)))


def elapsed(call: Callable[[], object], count: int, host_ms: float = 1.0) -> float:
    """Milliseconds that the GPU takes for so many calls, which the host launches in `host_ms`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    let_launches_queue(host_ms)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# Each call is timed in so many turns, in each of which it runs for about so many milliseconds, and so often.
_TURNS, _MILLISECONDS, _FEWEST, _MOST = 3, 1.0, 3, 20


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call of one or a few kernels on the current GPU, timed in turns."""
    counts = {}
    for name, call in calls.items():
        call()
        once = elapsed(call, 1)
        counts[name] = max(_FEWEST, min(_MOST, int(_MILLISECONDS / max(once, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            found[name].append(elapsed(call, counts[name]) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}
