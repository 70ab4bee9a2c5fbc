"""Time for a run of several workloads, each of which gets its share of what is left, and what the run has shown so far."""

from __future__ import annotations

import math
import time

from resnet_fused.bench.workloads import Workload

# A variant is timed for so many rounds at least. A round is two calls, and there are one to prepare, one to warm up, and one to
# check the result again.
FEWEST_ROUNDS = 3
_CALLS_BESIDE = 3


class Budget:
    """Seconds for all workloads of a run; without a limit every workload has all the time there is.

    Attributes:
        compiled: seconds that compiling the last model took; None where none was compiled yet.
    """

    def __init__(self, workloads: int, seconds: float = math.inf) -> None:
        self._end, self._to_come = time.monotonic() + seconds, workloads
        self._workload_end = self._end
        self._images: dict[tuple[str, str], float] = {}
        self.compiled: float | None = None

    def begin(self) -> float:
        """Begins the next workload; the seconds that it has: twice its share of what is left, but no more than there is.

        Where not all have the time that they need, it is better to measure those that come first than to leave out all.
        """
        now = time.monotonic()
        left = max(self._end - now, 0.0)
        own = min(2 * left / max(self._to_come, 1), left)
        self._to_come -= 1
        self._workload_end = now + own
        return own

    def left(self) -> float:
        """Seconds that the workload has left."""
        return self._workload_end - time.monotonic()

    def note_call(self, workload: Workload, images: int, seconds: float) -> None:
        """A call of stock with so many images took so long."""
        self._images[workload.model, workload.dtype] = seconds / images

    def call(self, workload: Workload) -> float:
        """Seconds that a call of stock may take, by what was noted of the model in this dtype; 0 if nothing was."""
        return self._images.get((workload.model, workload.dtype), 0.0) * workload.batch

    def too_slow(self, workload: Workload, variants: int) -> str | None:
        """Why the workload is left out: so many variants, called as seldom as can be, would take longer than it has."""
        once = self.call(workload)
        if once * variants * calls(FEWEST_ROUNDS) <= self.left():
            return None
        return f"left out: about {once:.1f} s a call" if once else "left out: no time"

    def rounds(self, workload: Workload, variants: int, most: int) -> int:
        """Rounds of timing that the workload has time for: `most`, or fewer, but FEWEST_ROUNDS."""
        once = self.call(workload) * variants
        if once == 0.0 or once * calls(most) <= self.left():
            return most
        return max(FEWEST_ROUNDS, int((self.left() / once - _CALLS_BESIDE) / 2))

    def note_compiled(self, seconds: float) -> None:
        """Compiling a model took so long, or longer."""
        self.compiled = seconds

    def for_compiling(self) -> float | None:
        """Seconds that compiling may take; None where it would take longer, by what the last model took."""
        most = self.left() / 2
        return most if (self.compiled or 0.0) < most else None


def calls(rounds: int) -> int:
    """Calls of a variant that so many rounds of timing take."""
    return 2 * rounds + _CALLS_BESIDE
