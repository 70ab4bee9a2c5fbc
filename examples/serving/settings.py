"""The server's settings: options of the command line, each with an environment variable."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from classifier import MAX_PIXELS, add_arguments

PREFIX = "RESNET_FUSED_SERVE_"
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
EPILOG = """
Each option has an environment variable: --max-batch 4 is RESNET_FUSED_SERVE_MAX_BATCH=4, --stock is RESNET_FUSED_SERVE_STOCK=1.
Where both are given, the option of the command line counts.

How to set it. Start with the deadline: the time after which your clients no longer want the answer. Measure one image alone,
and under load (/metrics has histograms). Raise --max-batch while throughput grows and the latency allows it. Then set
--queue-limit to about deadline / time of a batch x size of a batch: more could not be answered in time. One process serves one
model on one GPU or one CPU socket; for more, run several behind a load balancer.
"""


def usable_cpus() -> int:
    """Cores that this process may use: those of the machine, of its affinity, and of its container's quota."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")  # "150000 100000": one and a half cores; "max 100000": no limit
    if quota.exists():
        used, period = quota.read_text().split()
        if used != "max":
            cpus = min(cpus, int(used) / int(period))
    return max(1, math.ceil(cpus))


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {value}; it must be 1 or more")
    return value


def _time(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}; it must be a time in milliseconds, 0 or more")
    return value


def parser() -> argparse.ArgumentParser:
    """All options, with help that says how to choose them."""
    result = argparse.ArgumentParser(
        prog="server.py",
        description="Classifies images over HTTP: curl --data-binary @cat.jpg http://127.0.0.1:8000/classify",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(result)
    http = result.add_argument_group("HTTP")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 for all, behind a proxy with TLS (default: %(default)s)",
    )
    http.add_argument("--port", type=int, default=8000, help="port; 0: the system chooses, see the log (default: %(default)s)")
    http.add_argument("--access-log", action="store_true", help="a line in the log for each request; costs some throughput")
    limits = result.add_argument_group("limits")
    limits.add_argument(
        "--max-bytes", type=_positive, default=10 * 2**20, help="of an image as sent; more gets 413 (default: %(default)s)"
    )
    limits.add_argument(
        "--max-pixels",
        type=_positive,
        default=MAX_PIXELS,
        help="of an image as decoded or resized; more gets 413. A small file can decode to gigabytes: a pixel takes 4 bytes "
        "on each decoding thread (default: %(default)s)",
    )
    limits.add_argument(
        "--queue-limit",
        type=_positive,
        default=64,
        help="requests in the server at a time, from arrival to answer; one more gets 503 with Retry-After at once. It bounds "
        "memory, and the time that those inside wait (default: %(default)s)",
    )
    limits.add_argument(
        "--deadline-ms",
        type=_time,
        default=2000,
        help="a request not answered so many milliseconds after its arrival gets 504, or 408 if its image hadn't arrived; what "
        " still waits then is not computed (default: %(default)s)",
    )
    batching = result.add_argument_group("batching and threads")
    batching.add_argument(
        "--max-batch",
        type=_positive,
        default=8,
        help="images in one call of the model. On a CPU the gain ends at a few; on a GPU try 32 (default: %(default)s)",
    )
    batching.add_argument(
        "--max-wait-ms",
        type=_time,
        default=2,
        help="how long an image waits, when the model is idle, for others that are being received or decoded; while the model "
        "is busy they wait together anyway (default: %(default)s)",
    )
    batching.add_argument(
        "--threads",
        type=_positive,
        default=min(torch.get_num_threads(), usable_cpus()),
        help="threads of the model on a CPU. More than there are cores is slower (default: cores that this process may use, "
        "%(default)s here)",
    )
    batching.add_argument(
        "--decode-threads",
        type=_positive,
        default=usable_cpus(),
        help="threads that decode and resize images (default: %(default)s here, as many as cores)",
    )
    return result


def from_environment(environment: Mapping[str, str]) -> list[str]:
    """The options that environment variables ask for.

    Raises:
        ValueError: a variable with the prefix is no option's, or a switch is neither on nor off.
    """
    defaults = vars(parser().parse_args([]))
    found: list[str] = []
    for name, value in environment.items():
        if not name.startswith(PREFIX):
            continue
        key = name.removeprefix(PREFIX).lower()
        option = "--" + key.replace("_", "-")
        if key not in defaults:
            raise ValueError(f"The environment has {name}, but there is no option {option}; see --help.")
        if not isinstance(defaults[key], bool):
            found += [f"{option}={value}"]
        elif value.lower() in YES:
            found += [option]
        elif value.lower() not in NO:
            raise ValueError(f"{name} is {value!r}; it must be 1 or 0.")
    return found


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """The settings; ends the process with a message where one has no such value."""
    result = parser()
    try:
        return result.parse_args([*from_environment(environment), *arguments])
    except ValueError as error:
        result.error(str(error))
