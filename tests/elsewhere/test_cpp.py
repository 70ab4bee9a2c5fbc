"""examples/cpp: a frozen model's package in a process without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from support.processes import run
from support.tolerances import assert_as_good_as_stock

import resnet_fused as rf
from resnet_fused.backends import get, library

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor and the example need a C++ compiler; install g++"),
    pytest.mark.skipif(get("cpu").unavailable() is not None, reason=str(get("cpu").unavailable())),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built with CMake."""
    folder = tmp_path_factory.mktemp("cpp")
    # That of PyPI, which the extra "test" installs, is beside this Python.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=places)
    assert cmake is not None, "there is no cmake; pip install cmake"
    run([cmake, "-S", str(EXAMPLE), "-B", str(folder), f"-DTORCH={TORCH}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"])
    run([cmake, "--build", str(folder)])
    return folder / "serve"


def serve(program: Path, folder: Path, x: torch.Tensor, package: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in an empty environment; what it writes is in `folder`."""
    torch.save(x, folder / "x.pt")
    kernels = library.FOLDER / "resnet_fused_cpu.so"
    command = [program, package, kernels, folder / "x.pt", folder / "y.pt"]
    return subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, timeout=300)


@torch.no_grad()
def test_a_frozen_model_is_served_without_python(program: Path, trained, tmp_path: Path):
    model = trained(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5))
    ordinary = torch.randn(2, 3, 64, 72)
    fused = rf.fuse(model)
    frozen = rf.freeze(fused, ordinary)
    exported = torch.export.export(frozen, (ordinary,))
    package = str(torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2")))
    wide = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    wide.load_state_dict(model.state_dict())
    wide = wide.eval().double()
    for value in (0.5, float("nan"), float("inf"), 1e10):  # a number, and what Winograd's kernels decline
        x = ordinary.clone()
        x[1, 2, 17, 9] = value
        done = serve(program, tmp_path, x, package)
        assert done.returncode == 0, done.stderr
        y = torch.load(tmp_path / "y.pt", weights_only=True)
        want, truth = model(x), wide(x.double())
        assert y.stride() == want.stride()
        assert_as_good_as_stock(y, want, truth)
        torch.testing.assert_close(y, frozen(x), equal_nan=True)
        if value == 0.5:  # what is declined, the fused model computes with its batch norms not folded
            torch.testing.assert_close(y, fused(x))
    refused = serve(program, tmp_path, ordinary[:1], package)
    assert refused.returncode == 1
    assert "an input has shape (1, 3, 64, 72) and dtype Float; the model was frozen for (2, 3, 64, 72)" in refused.stderr


def test_no_python_is_linked(program: Path):
    kernels = library.FOLDER / "resnet_fused_cpu.so"
    for file in (program, kernels):
        linked = run(["ldd", str(file)], LD_LIBRARY_PATH=str(TORCH / "lib"))
        assert "libc10.so" in linked
        assert not any(name in linked for name in ("libpython", "libtorch_python")), linked


def test_a_missing_library_is_said(program: Path, tmp_path: Path):
    command = [program, tmp_path / "model.pt2", tmp_path / "none.so", tmp_path / "x.pt", tmp_path / "y.pt"]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.so: cannot open shared object file" in done.stderr
