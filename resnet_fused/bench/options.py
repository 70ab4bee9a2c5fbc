"""Reads the command line's options: each error names the option, the value, the rule and what to do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

DTYPES = ("float32", "bfloat16", "float16")


class UserError(Exception):
    """Something the user can put right; the command line prints it without a traceback."""


def need(command: str, *packages: str) -> None:
    """Raises UserError unless the packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{command} needs {package}, which is not installed; pip install 'resnet_fused[bench]'")


def names(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    """At least one of the known names, separated by commas."""
    found = [part.strip() for part in given.split(",") if part.strip()]
    for name in found or [given]:
        if name not in known:
            raise UserError(f"{option} has {name!r}; it takes {', '.join(known)}, separated by commas")
    return found


def models(given: str) -> list[str]:
    """Names of torchvision models."""
    if importlib.util.find_spec("torchvision") is None:
        raise UserError("models come from torchvision, which is not installed; pip install torchvision")
    import torchvision

    return names("--models", given, tuple(torchvision.models.list_models(module=torchvision.models)))


def integers(option: str, given: str) -> list[int]:
    """Positive integers, separated by commas."""
    found = given.split(",")
    for text in found:
        if not text.strip().isdigit() or int(text) < 1:
            raise UserError(f"{option} has {text!r}; it takes positive integers, separated by commas")
    return [int(text) for text in found]


def positive(option: str, value: float) -> float:
    """A number above 0."""
    if not 0 < value < float("inf"):
        raise UserError(f"{option} is {value:g}; it must be a number above 0")
    return value


def size(text: str) -> tuple[int, int]:
    """Height and width in pixels, from SIZE or HEIGHTxWIDTH."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) >= 32 for part in parts):
        raise UserError(f"--size is {text!r}; it takes pixels as SIZE or HEIGHTxWIDTH, at least 32, such as 224 or 256x192")
    return int(parts[0]), int(parts[-1])


def device(given: str) -> str:
    """cpu, cuda or one GPU."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", given):
        raise UserError(f"--device is {given!r}; it takes cpu, cuda, or one GPU as cuda:1")
    return given


def usable_device(given: str) -> str:
    """A device that is there."""
    if device(given) != "cpu":
        if not torch.cuda.is_available():
            raise UserError(f"--device is {given}, and there is no GPU here (torch.cuda.is_available() is False); take cpu")
        if torch.device(given).index is not None and torch.device(given).index >= torch.cuda.device_count():
            raise UserError(f"--device is {given}, and there are {torch.cuda.device_count()} GPUs; take a smaller number")
    return given


def set_threads(count: int | None) -> None:
    """Makes PyTorch use so many CPU threads; None leaves its own choice."""
    if count is not None:
        if count < 1:
            raise UserError(f"--threads is {count}; it must be at least 1")
        torch.set_num_threads(count)


def folder(option: str, path: Path) -> Path:
    """The folder, made now where it doesn't exist, since measuring takes minutes and its results must have a place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Asked by a file, since the permissions of a folder don't tell all that may forbid it.
        probe = path / ".resnet_fused"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} is {path}, where nothing can be written ({error.strerror}); choose another place") from error
    return path
