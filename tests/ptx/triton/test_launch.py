"""The host's side of a launch: compiled when it is prepared, and then called with tensors alone.

A driver stands in for CUDA's: it takes CPU tensors, and runs a launched kernel's PTX instruction by instruction.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import ptx_executor as px
import pytest
import torch
import triton
from support.problems import problem_of
from support.tolerances import relative_error
from support.triton_aot import CHIPS, problem, target

from resnet_fused.backends import ConvParameters, tf32
from resnet_fused.backends.triton import configs, conv2d, elementwise, prepare

KERNELS = (
    conv2d.conv2d_fwd_kernel,
    conv2d.conv2d_split_fwd_kernel,
    elementwise.add_relu_fwd_kernel,
)


class Driver:
    """As much of a Triton driver as a compiled kernel's launch needs."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 163 << 10},
        )
        self.launcher_cls = lambda source, metadata: _Launcher(self, source, metadata)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(80)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        (compiled,) = (k for kernel in KERNELS for k in kernel.device_caches[0][0].values() if k.kernel == binary)
        return object(), compiled, 0, 0, 1024


class _Launcher:
    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self.driver, self.signature = driver, source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, compiled: Any, packed: Any, *rest: Any) -> None:
        arguments = rest[3:]
        assert len(arguments) == len(self.signature)
        self.driver.launches.append((compiled.name, (x, y, z)))
        given = [a for a, kind in zip(arguments, self.signature.values(), strict=True) if kind != "constexpr"]
        px.launch_triton(compiled, (x, y, z), given)


@pytest.fixture
def driver():
    config, before = triton.runtime.driver, triton.runtime.driver._active
    stand_in = Driver()
    config.set_active(stand_in)
    yield stand_in
    for kernel in KERNELS:
        kernel.device_caches.clear()
    # Compiled kernels unload themselves through the driver that is active.
    gc.collect()
    config._active = before


def operands(posed: Any) -> tuple[ConvParameters, torch.Tensor, torch.Tensor | None]:
    (conv,) = posed.convs
    weight = torch.randn(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel) / 16
    x, residual = (torch.randn(shape) for shape in (posed.shape, posed.output_shape()))
    x, residual, weight, bias = (t.to(posed.dtype) for t in (x, residual, weight, torch.randn(conv.out_channels)))
    return ConvParameters((weight,), (bias,)), x, residual if posed.epilogue.residual else None


def expected(posed: Any, folded: ConvParameters, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    (conv,) = posed.convs
    weight, bias = folded.weights[0].double(), folded.biases[0].double()
    y = torch.conv2d(x.double(), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (y if residual is None else y + residual.double()).relu()


@pytest.mark.parametrize("op", ["conv2d_bn_relu", "conv2d_bn_add_relu"])
def test_a_prepared_convolution_launches_one_kernel_a_call(op, driver):
    posed = problem(op, (1, 32, 6, 6), 32, 3)
    folded, x, residual = operands(posed)
    kernel = prepare.convolution(posed, folded, None)
    assert not driver.launches
    for factor in (1, -2):
        y = kernel(x * factor, residual)
        torch.testing.assert_close(y.double(), expected(posed, folded, x * factor, residual), rtol=2e-3, atol=2e-3)
    assert [name for name, _ in driver.launches] == ["conv2d_fwd_kernel"] * 2


def test_float32_is_rounded_to_tf32_where_that_is_allowed(driver, monkeypatch):
    posed = problem("conv2d_bn_add_relu", (1, 32, 6, 6), 32, 3, dtype=torch.float32)
    folded, x, residual = operands(posed)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="tf32"))
    y = prepare.convolution(posed, folded, None)(x, residual)
    assert relative_error(y, tf32.exact(posed, folded)(x, residual)) < 1e-6


def test_a_split_convolution_launches_two(driver):
    posed = problem("conv2d_bn_add_relu", (1, 256, 3, 3), 32, 3)
    folded, x, residual = operands(posed)
    chosen = next(p for p in configs.plans(posed, CHIPS[80], False) if p.splits > 1)
    run = conv2d.bind(posed, chosen, CHIPS[80], False)
    y = torch.empty(posed.output_shape(), dtype=posed.dtype).contiguous(memory_format=torch.channels_last)
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    run(x, conv2d.pack(folded.weights[0], posed.convs[0], chosen), folded.biases[0], residual, y)
    torch.testing.assert_close(y.double(), expected(posed, folded, x, residual), rtol=2e-3, atol=2e-3)
    assert [name for name, _ in driver.launches] == ["conv2d_fwd_kernel", "conv2d_split_fwd_kernel"]


def test_an_unaligned_input_is_not_read_by_wide_accesses(driver):
    posed = problem("conv2d_bn_relu", (1, 32, 4, 4), 32, 1)
    folded, x, _ = operands(posed)
    shifted = torch.cat((x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()))[1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    y = prepare.convolution(posed, folded, None)(shifted, None)
    torch.testing.assert_close(y.double(), expected(posed, folded, x, None), rtol=2e-3, atol=2e-3)


def test_add_relu_launches_one_kernel(driver):
    posed = problem_of("add_relu", (1, 16, 3, 5), torch.float16, torch.device("cpu"))
    x, residual = torch.randn(2, *posed.shape).half().unbind()
    y = prepare.elementwise_kernel(posed)(x, residual)
    assert torch.equal(y, torch.relu(x + residual))
    assert [name for name, _ in driver.launches] == ["add_relu_fwd_kernel"]
