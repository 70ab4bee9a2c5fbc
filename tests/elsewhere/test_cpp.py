"""examples/cpp: a frozen model's package in a process without Python, on the CPU and on a GPU."""

from __future__ import annotations

import copy
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

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="AOTInductor and the example need a C++ compiler; install g++"
)


def on_cpu(test):
    """Marks a test whose kernels are those of the backend `cpu`."""
    reason = get("cpu").unavailable()
    return pytest.mark.cpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built with CMake."""
    return build(tmp_path_factory.mktemp("cpp"))


def build(folder: Path, *options: str) -> Path:
    # That of PyPI, which the extra "test" installs, is beside this Python.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=places)
    assert cmake is not None, "there is no cmake; pip install cmake"
    flags = [f"-DTORCH={TORCH}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror", *options]
    run([cmake, "-S", str(EXAMPLE), "-B", str(folder), *flags])
    run([cmake, "--build", str(folder)])
    return folder / "serve"


def serve(
    program: Path, folder: Path, x: torch.Tensor, package: str, kernels: Path = library.FOLDER / "resnet_fused_cpu.so"
) -> subprocess.CompletedProcess[str]:
    """Runs the program in an empty environment; what it writes is in `folder`."""
    torch.save(x, folder / "x.pt")
    command = [program, package, kernels, folder / "x.pt", folder / "y.pt"]
    return subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, timeout=300)


@on_cpu
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


@on_cpu
def test_no_python_is_linked(program: Path):
    kernels = library.FOLDER / "resnet_fused_cpu.so"
    for file in (program, kernels):
        linked = run(["ldd", str(file)], LD_LIBRARY_PATH=str(TORCH / "lib"))
        assert "libc10.so" in linked
        assert not any(name in linked for name in ("libpython", "libtorch_python")), linked


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_frozen_on_a_gpu_is_served_without_python(trained, tmp_path: Path):
    program = build(tmp_path / "build", "-DCUDA=ON")
    kernels = library.FOLDER / "resnet_fused_cuda.so"
    model = trained(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5))
    wide = copy.deepcopy(model).double().cuda()
    model = model.half().cuda()
    ordinary = torch.randn(2, 3, 64, 72, device="cuda").half()
    fused = rf.fuse(model)
    frozen = rf.freeze(fused, ordinary)
    exported = torch.export.export(frozen, (ordinary,))
    package = str(torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2")))
    for value in (0.5, float("nan"), float("inf")):
        x = ordinary.clone()
        x[1, 2, 17, 9] = value
        done = serve(program, tmp_path, x.cpu(), package, kernels)
        assert done.returncode == 0, done.stderr
        y = torch.load(tmp_path / "y.pt", weights_only=True).cuda()
        want, truth = model(x), wide(x.double())
        assert_as_good_as_stock(y, want, truth)
        torch.testing.assert_close(y, frozen(x), equal_nan=True, rtol=1e-3, atol=1e-3)
    refused = serve(program, tmp_path, ordinary[:1].cpu(), package, kernels)
    assert refused.returncode == 1
    assert "an input has shape (1, 3, 64, 72) and dtype Half; the model was frozen for (2, 3, 64, 72)" in refused.stderr
    linked = run(["ldd", str(kernels)], LD_LIBRARY_PATH=str(TORCH / "lib"))
    assert not any(name in linked for name in ("libpython", "libtorch_python")), linked


@on_cpu
def test_a_missing_library_is_said(program: Path, tmp_path: Path):
    command = [program, tmp_path / "model.pt2", tmp_path / "none.so", tmp_path / "x.pt", tmp_path / "y.pt"]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.so: cannot open shared object file" in done.stderr
