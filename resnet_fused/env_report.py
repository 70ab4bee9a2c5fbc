"""What was built, what is available, and why not: all that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

import resnet_fused
from resnet_fused import backends, config
from resnet_fused.backends.processor import processor
from resnet_fused.text import table


def versions() -> list[tuple[str, str]]:
    """Versions of the packages that matter, and which of them are missing."""
    found = [("resnet_fused", f"{resnet_fused.__version__}, {installation()}")]
    for package in ("torch", "torchvision", "triton", "timm", "numpy", "rich", "matplotlib"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return found


def installation() -> str:
    """How this copy of the library came here: as a wheel, which is built for many systems, or built from source on this one."""
    here = Path(resnet_fused.__file__).resolve().parent
    for distribution in importlib.metadata.distributions(name="resnet_fused"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        tag = (distribution.read_text("WHEEL") or "").partition("Tag: ")[2].partition("\n")[0]
        if origin.get("dir_info", {}).get("editable"):
            if Path(url2pathname(urlsplit(origin["url"]).path)) == here.parent:
                return f"built from source, editable, in {here.parent}"
        elif tag and Path(str(distribution.locate_file("resnet_fused"))).resolve() == here:
            system = tag.rpartition("-")[2]
            return f"a wheel for {system}" if system.startswith("manylinux") else f"built from source for {system}"
    return f"not installed, in {here.parent}"


def machine() -> list[tuple[str, str]]:
    """Processor, threads and GPUs. Looks for a GPU, so it may start the driver."""
    cpu = processor()
    lines = [
        ("python", sys.version.split()[0]),
        ("system", platform.platform()),
        ("CPU", str(cpu)),
        ("CPU signature", cpu.signature),
        ("instruction sets", " ".join(cpu.instruction_sets)),
        ("PyTorch uses", torch.backends.cpu.get_cpu_capability()),
        ("cores", f"{cpu.cores}, {cpu.threads} threads; PyTorch uses {torch.get_num_threads()}"),
        ("caches", cpu.caches),
        ("CUDA build of torch", str(torch.version.cuda or "no")),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    else:
        lines.append(("GPU", "none found by torch.cuda.is_available()"))
    return lines


def availability() -> list[tuple[str, str, str]]:
    """Each backend: whether it can run here; what it has, or why not, with the remedy."""
    rows = []
    for name in backends.names():
        backend = backends.get(name)
        reason = backend.unavailable()
        rows.append((name, "no", reason) if reason is not None else (name, "yes", backend.details()))
    return rows


def text() -> str:
    """The whole report, as `resnet-fused info` prints it."""
    settings = [
        ("RESNET_FUSED_BACKEND", config.backend()),
        ("RESNET_FUSED_CACHE_DIR", str(config.cache_dir())),
        ("RESNET_FUSED_TRIAL", "1" if config.trial() else "0"),
        ("RESNET_FUSED_LOG", logging.getLevelName(config.logger().getEffectiveLevel())),
        ("TRITON_INTERPRET", "1" if config.triton_interpreted() else "0"),
    ]
    parts = [
        table(("package", "version"), versions()),
        table(("machine", ""), machine()),
        table(("backend", "available", "what it has; or why not, and the remedy"), availability()),
        table(("setting", "value"), settings),
    ]
    return "\n\n".join(parts)
