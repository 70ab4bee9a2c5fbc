"""setup.py where CUDA is missing: it says so in one line, with the remedy, and builds the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA; install a CUDA build of it")
def test_a_missing_nvcc_is_said_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    said = [line for line in answer.stderr.splitlines() if line.startswith("resnet_fused:")]
    reason = f"there is no nvcc in CUDA_HOME={tmp_path}; correct or unset it"
    assert said == [f"resnet_fused: the CUDA kernels are not built, since {reason}."]


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA; install a CUDA build of it")
def test_an_nvcc_that_can_not_compile_is_said_in_one_line(tmp_path: Path) -> None:
    """As where its parts are of several versions, which pip brings if they aren't pinned together."""
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    fault = "ptxas fatal   : Unsupported .version 9.5; current version is '9.0'"
    version = f"Cuda compilation tools, release {torch.version.cuda}, V{torch.version.cuda}.88"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit 0\necho "{fault}" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (said,) = [line for line in answer.stderr.splitlines() if line.startswith("resnet_fused:")]
    assert f"can't compile ({fault})" in said
    assert f'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda}.*"' in said


def test_a_missing_library_names_the_compiler_that_pip_can_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.backends import library
    from resnet_fused.backends.cuda import CUDA

    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load.cache_clear()
    try:
        reason = CUDA().unavailable()
    finally:
        monkeypatch.undo()
        library.load.cache_clear()
    assert reason is not None
    assert "resnet_fused_cuda.so was not built" in reason
    assert "must be there before: pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]==" in reason
