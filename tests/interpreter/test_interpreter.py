"""Runs the tests of suite/ in a process of their own, because Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def numpy_is_too_new() -> bool:
    """Whether Triton's interpreter takes int() of arrays with one element, and NumPy refuses it."""
    try:
        return version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(numpy_is_too_new(), reason="the interpreter of Triton 3.6 needs an older NumPy: pip install 'numpy<2.4'")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing: pip install triton, on Linux")
def test_suite_passes_in_the_interpreter():
    suite = Path(__file__).with_name("suite")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    run = subprocess.run(command, env=environment, cwd=suite.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}\nAlone: TRITON_INTERPRET=1 pytest {suite}"
