"""The compiled library on a machine without a GPU: it loads, registers its operators, and leaves the driver alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.problems import problem_of

from resnet_fused.backends import Conv, get

OPERATORS = ("conv2d_fwd", "add_relu_fwd", "add_relu_bwd", "bn_statistics", "bn_apply_fwd", "bn_reduce_bwd", "bn_apply_bwd")

CHECK = """
import torch
import resnet_fused
from resnet_fused.backends import library

def driver():
    return any("libcuda.so" in line for line in open("/proc/self/maps"))

assert not driver(), "import resnet_fused loaded the CUDA driver"
assert library.load("resnet_fused_cuda") is None
assert not driver(), "loading the library loaded the CUDA driver"
assert not torch.cuda.is_initialized()
for name in {names}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fused_cuda::" + name, "CUDA"), name
"""


def test_loads_without_a_driver() -> None:
    code = CHECK.format(names=OPERATORS)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr


def test_cpu_tensors_are_refused_by_the_dispatcher() -> None:
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(NotImplementedError, match="resnet_fused_cuda::add_relu_fwd"):
        torch.ops.resnet_fused_cuda.add_relu_fwd(x, x)


def test_reasons() -> None:
    backend = get("cuda")
    if not torch.cuda.is_available():
        assert "no GPU" in backend.unavailable()
    conv = Conv(8, 8, (3, 3))
    problem = problem_of("conv2d_bn_relu", (1, 8, 4, 4), torch.float32, torch.device("cpu"), (conv,))
    assert backend.why_not(problem) == "it serves cuda tensors, not cpu"
