"""Loads the compiled libraries of resnet_fused/lib when a backend first asks, and says why where that can't be done."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

_BUILD = (
    "build resnet_fused from source with this PyTorch and a C++ compiler present: pip install --no-build-isolation "
    "--no-binary resnet_fused resnet_fused, or -e . in a checkout"
)
FOLDER = Path(__file__).resolve().parent.parent / "lib"


@functools.cache
def digest(name: str) -> str:
    """Tells one build of `name`.so from another; "none" where there is none. Reads it once, when it is first asked for."""
    path = FOLDER / f"{name}.so"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return "none"


@functools.cache
def load(name: str) -> str | None:
    """Loads `name`.so, whose operators then stand in torch.ops.<name>. None, or the reason why it can't be loaded."""
    path = FOLDER / f"{name}.so"
    if not path.exists():
        return f"the compiled library {path.name} was not built; {_BUILD}, and see what setup.py says"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled library {path.name} can't be loaded ({error}); {_BUILD}"
    return None
