"""Names of the files that a run writes: they tell what was run, and an earlier run's files stay."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# More models than these are counted, not named.
_MOST_NAMED = 4


def stem(kind: str, models: Sequence[str], batches: Iterable[int], dtypes: Iterable[str], size: str, device: str) -> str:
    """Such as "inference_resnet18+resnet50_batch1+8_float32_224"; the device is named where it isn't the CPU.

    Args:
        kind: what was measured: inference, layers, training or zoo.
        size: of the images; "" where each model has its own.
    """
    named = models if len(models) <= _MOST_NAMED else [f"{len(models)}models"]
    parts = [kind, "+".join(named), "batch" + "+".join(map(str, batches)), "+".join(dtypes), size]
    parts += [] if device == "cpu" else [device]
    return re.sub(r"[^\w+.-]", "-", "_".join(filter(None, parts)))


def place(folder: Path, stem: str) -> Path:
    """Where a run writes, without the suffix: `stem` in the folder, with a number where an earlier run wrote there."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    taken = {path.stem for path in folder.iterdir()}
    return folder / next(name for name in names if name not in taken)
