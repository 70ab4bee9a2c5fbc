"""What a launch of a Triton kernel costs the host: our bound launches, and Triton's own `kernel[grid](…)`.

Where there is no GPU, libcuda_stub.c stands in for the CUDA driver: Triton's launcher runs as it is, up to the driver's
door, on CPU tensors that nothing reads.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.problems import problem_of

from resnet_fused.backends import ConvParameters
from resnet_fused.backends.problem import Conv

triton = pytest.importorskip(
    "triton", reason="Triton is not installed; pip install triton (PyTorch for CUDA on Linux brings it)"
)

F16 = torch.float16
CASES = ("add_relu", "conv2d_bn_add_relu")


class StubDriver:
    """Triton's CUDA driver on the stub: its own launcher, for a chip that isn't there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        target = GPUTarget("cuda", arch, 32)
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The GPU, or the CPU with the stub as Triton's driver."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is neither a GPU nor a C compiler for the stub of its driver: install gcc")
    library = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = Path(__file__).with_name("libcuda_stub.c")
    command = [
        compiler,
        "-O2",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{library.name}",
        f"-I{include}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    active, path = triton.runtime.driver, triton.knobs.nvidia.libcuda_path
    before = active._active
    triton.knobs.nvidia.libcuda_path = str(library.parent)
    active.set_active(StubDriver(90))
    yield torch.device("cpu")
    from resnet_fused.backends.triton import conv2d, elementwise

    for kernel in (conv2d.conv2d_fwd_kernel, elementwise.add_relu_fwd_kernel):
        kernel.device_caches.clear()
    # Compiled kernels unload themselves through the driver that is active.
    gc.collect()
    active._active = before
    triton.knobs.nvidia.libcuda_path = path


def _calls(case, device):
    """Calls that each do all that the host does for one launch, by variant, and the tensor that they fill."""
    from resnet_fused.backends.triton import configs, conv2d, elementwise, prepare

    shape = (1, 64, 14, 14)
    x, residual, y = (torch.randn(shape, device=device).to(F16, memory_format=torch.channels_last) for _ in range(3))
    if case == "add_relu":
        launch = elementwise.add_relu_fwd(x.numel(), F16)
        tensors, bound = (x, residual, y), launch.bind()
        prepared = prepare.elementwise_kernel(problem_of("add_relu", shape, F16, device))
    else:
        conv = Conv(64, 64, (3, 3), padding=(1, 1))
        problem = problem_of("conv2d_bn_add_relu", shape, F16, device, (conv,))
        chip = configs.Chip.of(device) if device.type == "cuda" else configs.Chip("cuda", 90, 132, 227 << 10)
        plan = next(plan for plan in configs.plans(problem, chip, False) if plan.splits == 1)
        weight, bias = torch.randn(64, 64, 3, 3, device=device).to(F16) / 24, torch.randn(64, device=device).to(F16)
        tensors = (x, conv2d.pack(weight, conv, plan), bias, residual, y)
        launch, bound = conv2d.launches(problem, plan, chip, False)[0], conv2d.bind(problem, plan, chip, False)
        prepared = prepare.convolution(problem, ConvParameters((weight,), (bias,)), plan.name)
    calls = {
        "1 bound launch": lambda: bound(*tensors),
        "2 Triton's launch": _by_triton(launch, tensors),
        "3 prepared kernel, result allocated": lambda: prepared(x, residual),
    }
    return calls, y


def _by_triton(launch, tensors):
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return lambda: launch.kernel[launch.grid](*tensors, *launch.scalars, **launch.constants, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["1 bound launch", "2 Triton's launch", "3 prepared kernel, result allocated"])
def test_launch(benchmark, device, case, variant):
    calls, y = _calls(case, device)
    if device.type == "cuda":
        calls["1 bound launch"]()
        expected = y.clone()
        y.fill_(float("nan"))
        result = calls[variant]()
        torch.testing.assert_close(y if result is None else result, expected, rtol=1e-3, atol=1e-3)
    benchmark.group = f"host's time of a launch: {case}"
    benchmark(calls[variant])
