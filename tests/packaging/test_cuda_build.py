"""setup.py where CUDA is missing: it says so in one line, with the remedy, and builds the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA; install a CUDA build of it")


@needs_cuda
def test_a_missing_nvcc_is_said_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    said = [line for line in answer.stderr.splitlines() if line.startswith("resnet_fused:")]
    reason = f"there is no nvcc in CUDA_HOME={tmp_path}; correct or unset it"
    assert said == [f"resnet_fused: the CUDA kernels are not built, since {reason}."]


@needs_cuda
def test_a_missing_library_names_the_compiler_that_pip_can_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.backends import library
    from resnet_fused.backends.cuda.backend import CUDA

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


def test_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.backends.cuda.backend import CUDA

    monkeypatch.setattr(torch.version, "cuda", None)
    assert CUDA().unavailable() == "this PyTorch is built without CUDA; install one that is built with it"


def toolkit(folder: Path, release: str, compiles: bool = True) -> Path:
    """A CUDA toolkit of which only nvcc's answers are there."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    fatal = "ptxas fatal   : Unsupported .version 9.5; current version is '9.0'"
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--list-gpu-code) echo "sm_75 sm_80 sm_90 sm_100" ;;
-c) {"true" if compiles else f'echo "ptxas probe.ptx, line 9; note" >&2; echo "{fatal}" >&2; exit 255'} ;;
esac
""")
    nvcc.chmod(0o755)
    return folder


def evaluate(expression: str, home: Path) -> tuple[str, list[str]]:
    """The text of an expression with setup.py's names, and what setup.py said."""
    code = f"import pathlib, runpy, sys; sys.argv = ['setup.py', '--version']; found = runpy.run_path('setup.py'); {expression}"
    environment = {**os.environ, "CUDA_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()[-1], [line for line in answer.stderr.splitlines() if line.startswith("resnet_fused:")]


@needs_cuda
@pytest.mark.parametrize("compiles", [True, False])
def test_parts_of_two_releases_are_found_before_the_build(compiles: bool, tmp_path: Path) -> None:
    home = toolkit(tmp_path, torch.version.cuda, compiles)
    said, _ = evaluate(f"print(found['cuda_fault'](pathlib.Path({str(tmp_path / 'build')!r})))", home)
    if compiles:
        assert said == "None"
    else:
        assert "can't compile an empty kernel (ptxas fatal   : Unsupported .version 9.5; current version is '9.0')" in said
        assert f'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda}.*"' in said


@needs_cuda
def test_a_newer_nvcc_is_used_and_its_need_of_a_newer_driver_said(tmp_path: Path) -> None:
    major, minor = map(int, torch.version.cuda.split(".")[:2])
    newer = f"{major}.{minor + 5}"
    missing, said = evaluate("print(found['cuda_missing']())", toolkit(tmp_path, newer))
    assert missing == "None"
    assert f"PTX of it needs a driver of CUDA {newer} or newer." in said[0]


@needs_cuda
def test_without_a_gpu_the_architectures_are_those_that_nvcc_knows(tmp_path: Path) -> None:
    listed, said = evaluate("import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])", toolkit(tmp_path, torch.version.cuda))
    assert listed == "7.5 8.0 9.0 10.0+PTX"
    assert not said
