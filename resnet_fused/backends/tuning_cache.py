"""Choices that `rf.tune` measured on this machine, kept on disk, and consulted by the automatic choice.

One JSON file a device, in `config.cache_dir()`, named by a digest of what the times depend on (`machine`). A file that
can't be read, has another format or was made on another machine is ignored with a warning. What is read is only ever
compared with names that this version knows; nothing in it is executed, and a recorded backend that can't serve is
passed over.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused import config
from resnet_fused.backends import library
from resnet_fused.backends.freezing import freezing
from resnet_fused.backends.problem import Activation, Conv, Pointwise, Problem, Step, Types
from resnet_fused.backends.processor import processor

_FORMAT = 2
_LARGEST_FILE = 64 << 20

# What is recorded for a whole op that is fastest as a composition of its parts.
PARTS = "parts"


class Choice(NamedTuple):
    """The backend that was measured as the fastest for a problem, and which of its plans, if it has several."""

    backend: str
    plan: str | None = None


_tables: dict[tuple[torch.device, Path], dict[str, Any]] = {}
_generation = 0


def generation() -> int:
    """Counts changes of the cache, so that kernels bound before a change can be told from later ones."""
    return _generation


def choice(problem: Problem) -> Choice | None:
    """What was recorded for the problem on this machine; None if nothing was."""
    table = _table(problem.device)
    if not table:
        return None
    entry = table.get(key(problem))
    if not isinstance(entry, dict) or not isinstance(entry.get("backend"), str):
        return None
    plan = entry.get("plan")
    found = Choice(entry["backend"], plan if isinstance(plan, str) else None)
    return found if rejected(problem, *found) is None else None


def rejection_key(backend: str, label: str, dtype: str, plan: str = "") -> str:
    """Where `record` keeps whether a kernel of a backend was found wrong; its entry has the reason as "rejected"."""
    return f"kernel {backend} {label} {dtype} {plan}".rstrip()


def rejected(problem: Problem, backend: str, plan: str | None = None) -> str | None:
    """Why `resnet-fused verify` found the backend's kernel wrong on this machine; None if it didn't."""
    table = _table(problem.device)
    if not table:
        return None
    dtype = str(problem.types.source).removeprefix("torch.")
    entry = table.get(rejection_key(backend, _verified(problem).label, dtype, plan or ""))
    return (entry.get("rejected") or None) if isinstance(entry, dict) else None


def _verified(problem: Problem) -> Problem:
    """The problem as verify poses it: of the functions it tries ReLU, and kernels that apply another one are those without."""
    last = problem.steps[-1]
    if last.epilogue.activation in (Activation.NONE, Activation.RELU):
        return problem
    bare = last._replace(epilogue=last.epilogue._replace(activation=Activation.NONE, slope=0.0))
    return replace(problem, steps=(*problem.steps[:-1], bare))


def plan(problem: Problem, backend: str) -> str | None:
    """The plan that was recorded for the problem, if it is one of that backend's."""
    found = choice(problem)
    return found.plan if found is not None and found.backend == backend else None


def dropped(problem: Problem) -> dict[str, str]:
    """Candidates that were found wrong for the problem on this machine, and why."""
    entry = _table(problem.device).get(key(problem))
    found = entry.get("dropped") if isinstance(entry, dict) else None
    return {str(name): str(why) for name, why in found.items()} if isinstance(found, dict) else {}


def record(device: torch.device, entries: dict[str, dict[str, Any]]) -> Path:
    """Adds entries (by `key`) to the device's file, with what other processes wrote meanwhile, and gives its path.

    Each entry has "backend", and may have "plan", "ms" (times by candidate) and "dropped" (reasons by candidate).

    Raises:
        OSError: the file can't be written.
    """
    path = _write(device, entries)
    forget()
    return path


def add(device: torch.device, entries: dict[str, dict[str, Any]]) -> None:
    """As `record`, for problems that no kernel was bound for yet, so that kernels of others need not be bound again.

    Raises:
        OSError: the file can't be written; the entries hold for this process all the same.
    """
    _table(device).update(entries)
    _write(device, entries)


def _write(device: torch.device, entries: dict[str, dict[str, Any]]) -> Path:
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    choices = {**_read(path, device), **entries}
    content = {"format": _FORMAT, "machine": machine(device), "choices": choices}
    # Another process sees the old file or the new one, never a half.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return path


def forget() -> None:
    """Drops what was read; files are read again, and kernels bound again, when they are next needed."""
    global _generation
    _tables.clear()
    _generation += 1


def key(problem: Problem) -> str:
    """The problem as a line of text, with the settings of PyTorch that its kernels follow."""
    settings = []
    if problem.device.type == "cuda":
        settings.append(f"benchmark={torch.backends.cudnn.benchmark}")
        if freezing():  # chosen among fewer
            settings.append("frozen")
        if problem.dtype == torch.float32:
            settings.append(f"conv={torch.backends.cudnn.conv.fp32_precision}")  # type: ignore[attr-defined]
    elif problem.device.type == "cpu":
        settings.append(f"threads={torch.get_num_threads()}")
    shape, types = "x".join(map(str, problem.shape)), [str(dtype).removeprefix("torch.") for dtype in problem.types]
    dtypes = types[0] if problem.types == Types.of(problem.types.source) else "/".join(types)
    steps = "; ".join(map(_text, problem.steps))
    return " ".join((shape, dtypes, str(problem.memory_format), problem.precision, f"[{steps}]", *settings))


def _text(step: Step) -> str:
    operation, epilogue = step.operation, step.epilogue
    if isinstance(operation, Conv):
        c = operation
        parts = [f"{c.in_channels}>{c.out_channels} k{c.kernel} s{c.stride} p{c.padding} d{c.dilation} g{c.groups}"]
    else:
        parts = [operation.value if isinstance(operation, Pointwise) else str(operation)]
    parts += [
        str(step.reads),
        "" if epilogue.bias else "no bias",
        "gate" if epilogue.gate else "",
        "residual" if epilogue.residual else "",
        epilogue.activation.value,
        str(epilogue.slope) if epilogue.slope else "",
    ]
    parts.append("" if epilogue.pool is None else f"pool{tuple(epilogue.pool)}")
    return " ".join(filter(None, parts))


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """What the times depend on, beside the problem: the chip, its driver, and versions."""
    found = {"torch": torch.__version__, "resnet_fused": _version("resnet_fused"), "triton": _version("triton")}
    # Another build's kernels may take other times, and be right where these are wrong.
    found["library"] = library.digest("resnet_fused_cuda" if device.type == "cuda" else "resnet_fused_cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        # PyTorch gives NVIDIA's GPUs a gcnArchName as well, which is their name.
        capability = f"{properties.major}.{properties.minor}"
        found["architecture"] = properties.gcnArchName if torch.version.hip else capability
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["driver"] = torch.version.hip or _first_line("/proc/driver/nvidia/version")
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        # What the kernels' times depend on is often the same in name alone: virtual machines call several generations alike.
        found.update(device=device.type, **processor().to_json())
    return found


def _first_line(path: str) -> str:
    """The first line of a file, or nothing where there is no such file."""
    try:
        return Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def file_of(device: torch.device) -> Path:
    digest = hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()[:16]
    return config.cache_dir() / f"tuning-{digest}.json"


def _table(device: torch.device) -> dict[str, Any]:
    # Most people never tune: a look at the folder is all that it costs them, and the device isn't asked for its name.
    folder = config.cache_dir()
    table = _tables.get((device, folder))
    if table is None:
        table = _read(file_of(device), device) if folder.is_dir() else {}
        _tables[device, folder] = table
    return table


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """The choices in a file; none, with a warning, if there is anything wrong with it."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE >> 20} MiB")
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("choices"), dict):
            raise ValueError("it is no table of choices")
        if content.get("format") != _FORMAT:
            raise ValueError(f"it has format {content.get('format')!r}, and this version reads {_FORMAT}")
        if content.get("machine") != machine(device):
            raise ValueError("it was made on another machine, or with other versions")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        config.logger().warning("the tuning cache %s is ignored: %s. Delete it, and run rf.tune again.", path, error)
        return {}
    return content["choices"]
