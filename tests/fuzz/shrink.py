"""Makes a failing trial smaller: steps and lines of the module that can go while the same kind of difference stays."""

from __future__ import annotations

import dataclasses
import re
import time

from fuzz.grammar import Program
from fuzz.trial import Against, Trial, judge


def shrink(trial: Trial, against: Against, ignored: frozenset[str], seconds: float = 60.0) -> Trial:
    """A smaller trial that fails as this one does, as far as the time allows."""
    kinds = {d.kind for d in trial.differences}
    end = time.monotonic() + seconds

    def smaller(program: Program, steps: list[str]) -> Trial | None:
        candidate = Trial(trial.seed, trial.number, program, steps)
        try:
            judge(candidate, against, ignored)
        except Exception:  # the module can't be made without that line
            return None
        return candidate if kinds & {d.kind for d in candidate.differences} else None

    best = trial
    changed = True
    while changed and time.monotonic() < end:
        changed = False
        for i in reversed(range(len(best.steps))):
            if "fuse(" not in best.steps[i] and time.monotonic() < end:
                found = smaller(best.program, best.steps[:i] + best.steps[i + 1 :])
                best, changed = found or best, changed or found is not None
        for part in re.split(r"\n(?=class )", best.program.source)[1:]:
            if not part.startswith(("class Model", "class Tagged")) and part in best.program.source and time.monotonic() < end:
                found = smaller(dataclasses.replace(best.program, source=best.program.source.replace(part, "")), best.steps)
                best, changed = found or best, changed or found is not None
        lines = best.program.source.split("\n")
        first = next(i for i, line in enumerate(lines) if line.startswith("class Model"))
        for i in reversed(range(first, len(lines))):
            if not lines[i].startswith("        ") or "super()" in lines[i] or time.monotonic() > end:
                continue
            shorter = lines[:i] + lines[i + 1 :]
            found = smaller(dataclasses.replace(best.program, source="\n".join(shorter)), best.steps)
            if found is not None:
                best, lines, changed = found, shorter, True
    return best
