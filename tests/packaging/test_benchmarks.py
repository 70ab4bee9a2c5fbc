"""`make bench` can start: its files are found, and one of its benchmarks runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _pytest(*arguments: str) -> str:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; pip install 'resnet_fused[bench]'")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *arguments]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and takes what a worker starts for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_file_of_benchmarks_is_collected():
    collected = _pytest("--collect-only")
    for path in (ROOT / "benchmarks").glob("test_*.py"):
        assert path.name in collected


def test_the_options_of_make_bench_give_a_table():
    options = re.findall(r"--benchmark-\S+", (ROOT / "Makefile").read_text())
    assert options
    table = _pytest("-k", "test_dispatch", *options, "--benchmark-max-time=0.01", "--benchmark-min-rounds=1")
    assert "dispatch of a 1-pixel convolution" in table
    assert "Median" in table
    assert "3 tests" in table
