"""Settings from the environment. The only module that reads os.environ.

| variable | meaning | default |
|---|---|---|
| RESNET_FUSED_BACKEND | backend for every op, as rf.use_backend names them | auto |
| RESNET_FUSED_CACHE_DIR | folder of the tuning cache | the user's cache folder, see `cache_dir` |
| RESNET_FUSED_TRIAL | 0: no kernel is tried when a GPU first meets a problem, see docs/gpu.md | 1 |
| RESNET_FUSED_LOG | level of the logger "resnet_fused": DEBUG, INFO, WARNING, ERROR | WARNING |
| ONEDNN_MAX_CPU_ISA | oneDNN's own: the newest instruction set that it may use, such as AVX2 | all |
| TRITON_INTERPRET | Triton's own: 1 runs its kernels on CPU tensors, in its interpreter; set before the first import | off |

RESNET_FUSED_BACKEND is read once a process, the others whenever they are needed. Building reads CUDA_HOME and
TORCH_CUDA_ARCH_LIST as well: docs/cuda-kernels.md.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def backend() -> str:
    """Name of the backend that the environment asks for, or "auto"."""
    return os.environ.get("RESNET_FUSED_BACKEND", "").strip().lower() or "auto"


def cache_dir() -> Path:
    """Folder of the tuning cache: RESNET_FUSED_CACHE_DIR, or `resnet_fused` in the system's folder for caches."""
    chosen = os.environ.get("RESNET_FUSED_CACHE_DIR")
    if chosen:
        return _expanded(chosen, os.environ.get("HOME"))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(os.path.join(base, "resnet_fused"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=16)
def _expanded(folder: str, home: str | None) -> Path:
    """A folder without ~. Kept, since training asks for the tuning cache at each batch norm; `home` is what it depends on."""
    return Path(folder).expanduser()


def trial() -> bool:
    """Whether kernels are tried when a GPU first meets a problem."""
    return os.environ.get("RESNET_FUSED_TRIAL", "").strip().lower() not in ("0", "false", "off", "no")


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, read before the import)."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "yes")


def onednn_limit() -> str:
    """The newest instruction set that oneDNN may use (ONEDNN_MAX_CPU_ISA), by its name there; "ALL" where there is no limit."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").strip().upper() or "ALL"


def environment_of_child() -> dict[str, str]:
    """Environment of a Python process that finds the modules which this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def logger() -> logging.Logger:
    """The library's logger, at the level that RESNET_FUSED_LOG asks for."""
    log = logging.getLogger("resnet_fused")
    level = os.environ.get("RESNET_FUSED_LOG", "").strip().upper()
    if level:
        if level not in LOG_LEVELS:
            raise ValueError(f"RESNET_FUSED_LOG is {level!r}; it must be one of {', '.join(LOG_LEVELS)}, or unset for WARNING.")
        log.setLevel(level)
    return log
