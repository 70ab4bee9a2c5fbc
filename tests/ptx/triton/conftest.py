"""Puts tools/ on the path, for tools/ptx_executor."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

# Triton comes with PyTorch on Linux; elsewhere there is nothing to compile with.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
