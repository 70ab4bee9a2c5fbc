"""Leaves the folder out where there is no Triton."""

import importlib.util

# Triton comes with PyTorch on Linux; elsewhere there is nothing to compile with.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
