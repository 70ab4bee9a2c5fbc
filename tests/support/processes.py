"""Programs of their own, for what a process must do that has done nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import resnet_fused as rf


def run_python(script: str, *arguments: object) -> None:
    """Runs a script that imports this package; asserts that it ends without an error."""
    paths = [str(Path(rf.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    run([sys.executable, "-c", script, *map(str, arguments)], PYTHONPATH=os.pathsep.join(paths))


def run(command: list[str], **environment: str) -> str:
    """Runs a command; asserts that it ends without an error, and gives what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
