"""Checks an installed resnet_fused where there is no compiler: a fused model runs on the compiled kernels and is right.

    env PATH=/nonexistent build/wheel-torch-2.11.0/bin/python tools/check_install.py

tests/packaging/test_wheel.py and `make test-wheel` run it by the Python of the environment that has the wheel.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import resnet_fused as rf
from resnet_fused import env_report
from resnet_fused.backends import get, library

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")


def main() -> None:
    found = [name for name in COMPILERS if shutil.which(name)]
    assert not found, f"compilers on PATH: {found}; run this with a PATH without them"
    assert Path(sys.prefix) in Path(rf.__file__).parents, f"{rf.__file__} is not in the environment {sys.prefix}"

    reason = get("cpu").unavailable()
    assert reason is None, reason
    # A wheel of one machine may have no CUDA kernels; and PyTorch must be built with the same release of CUDA, and bring it.
    if torch.version.cuda is not None and (library.FOLDER / "resnet_fused_cuda.so").exists():
        reason = library.load("resnet_fused_cuda")
        assert reason is None or "(libcudart.so" in reason, reason
        print(f"CUDA kernels: {reason or 'loaded'}")

    torch.manual_seed(0)
    model, images = rf.resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fused = rf.fuse(model, example_inputs=images)
        fused(images)
    verified = rf.verify(model, fused, images)
    assert verified.passed, str(verified)
    report = rf.report(fused)
    assert all("cpu" in row.backends for row in report.rows), "some convolutions don't run on the compiled kernels"
    print(f"\n{env_report.text()}\n")
    print(f"resnet_fused {rf.__version__} with PyTorch {torch.__version__}: right, and on the compiled kernels")


if __name__ == "__main__":
    main()
