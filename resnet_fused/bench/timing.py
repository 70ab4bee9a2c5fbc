"""Interleaved timing: A B A B, so that a machine that slows down for a while slows all variants down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# A variant runs for so long before it is timed.
SETTLE_SECONDS = 0.05


@dataclass
class Samples:
    """Times of one variant, milliseconds a call."""

    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return quantile(self.times, 0.5)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        return (quantile(self.times, 0.75) - quantile(self.times, 0.25)) / self.median


def quantile(values: list[float], q: float) -> float:
    """Quantile by linear interpolation."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 5, synchronize: Callable[[], None] | None = None
) -> Iterator[tuple[str, dict[str, Samples]]]:
    """Times the calls in turn until `seconds` have passed, and at least for `rounds` rounds. Each is warmed up before.

    Yields the name of the variant just timed and all samples so far, for a progress bar; the last is the result. Every
    variant has the machine to itself for some calls of its turn before the last is timed: the first finds the caches full of
    another's data, and the threads of other engines go on looking for work for some milliseconds (onnxruntime's for twenty).
    """
    samples = {name: Samples() for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            turn = time.perf_counter()
            while True:
                call()
                if synchronize is not None:
                    synchronize()
                before = time.perf_counter()
                if before - turn >= SETTLE_SECONDS:
                    break
            call()
            if synchronize is not None:
                synchronize()
            samples[name].times.append((time.perf_counter() - before) * 1e3)
            yield name, samples
        done += 1
