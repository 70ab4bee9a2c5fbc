"""The Python side of the backend: what it serves, how it packs, and prepared kernels with the compiled operators emulated."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support import emulated_cuda as emulate
from support.emulated_cuda import A100, H100, T4
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

from resnet_fused.backends import NO_PARAMETERS, Conv, ConvParameters, Problem, get
from resnet_fused.backends.cuda import device as cuda_device
from resnet_fused.backends.cuda.batch_norm import BatchNorm
from resnet_fused.backends.cuda.convolution import pack_weight, plan_problem
from resnet_fused.ops import bn_add_relu

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CONV = Conv(16, 24, (3, 3), (1, 1), (1, 1))


def problem(conv: Conv = CONV, dtype: torch.dtype = torch.float16, device: torch.device = GPU, **other) -> Problem:
    return problem_of("conv2d_bn_add_relu", (1, conv.in_channels, 6, 7), dtype, device, (conv,), **other)


BOTTLENECK = problem_of("bottleneck", (1, 8, 4, 4), torch.float16, GPU, [Conv(8, 8, (1, 1))] * 3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Properties that every CUDA device has; an A100's until a test changes them."""
    properties = list(A100)
    monkeypatch.setattr(cuda_device, "properties", lambda device: properties)
    return properties


@pytest.fixture
def float32_precision(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for torch.backends.cudnn.conv, whose switch can't be set back to what it was."""
    switch = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cudnn, "conv", switch)
    return switch


@pytest.mark.parametrize(
    ("asked", "device", "reason"),
    [
        pytest.param(problem(device=CPU), A100, "it serves cuda tensors, not cpu", id="device"),
        pytest.param(problem(dtype=torch.float64), A100, "not torch.float64", id="dtype"),
        pytest.param(problem(), [70, 80, 96 << 10, 96 << 10], "compute capability 7.5 or newer", id="old_gpu"),
        pytest.param(problem(dtype=torch.bfloat16), T4, "bfloat16 needs compute capability 8.0", id="bfloat16_on_sm75"),
        pytest.param(problem(CONV._replace(groups=2)), A100, "one group, not 2", id="groups"),
        pytest.param(problem(CONV._replace(kernel=(17, 1), padding=(8, 0))), A100, "up to 16 rows", id="filter"),
        pytest.param(BOTTLENECK, A100, "as a whole it serves bottlenecks", id="op"),
    ],
)
def test_unsupported_says_why(asked: Problem, device: list[int], reason: str, gpu: list[int]) -> None:
    gpu[:] = device
    assert reason in get("cuda").why_not(asked)


@pytest.mark.parametrize("op", ["bn", "bn_relu", "bn_add_relu", "add_relu", "add_relu_backward"])
def test_serves_elementwise_ops(op: str, gpu: list[int]) -> None:
    assert get("cuda").why_not(problem_of(op, (1, 8, 4, 4), torch.bfloat16, GPU)) is None


def test_variants_follow_the_arithmetic_that_is_allowed(gpu: list[int], float32_precision: SimpleNamespace) -> None:
    backend, float32 = get("cuda"), problem(dtype=torch.float32)
    assert all(name.startswith("conv2d_fwd_tf32") for name in backend.plans(float32))
    exact = problem(dtype=torch.float32, precision="direct")
    assert all(name.startswith("conv2d_fwd_f32") for name in backend.plans(exact))
    float32_precision.fp32_precision = "ieee"
    assert backend.plans(float32) == backend.plans(exact)


def whole(images: int, capability: int, gpu: list[int]) -> bool:
    """Whether a bottleneck of width 64 in one kernel is preferred where no trial was made."""
    gpu[:] = [capability, *H100[1:]]
    convs = [Conv(256, 64, (1, 1)), Conv(64, 64, (3, 3), (1, 1), (1, 1)), Conv(64, 256, (1, 1))]
    return get("cuda").preferred(problem_of("bottleneck", (images, 256, 56, 56), torch.float16, GPU, convs))


def test_whole_blocks_are_preferred_where_they_were_measured_to_be_faster(gpu: list[int]) -> None:
    assert whole(32, 90, gpu)
    assert not whole(1, 90, gpu)
    assert not whole(32, 80, gpu)


def test_packing_for_tf32_rounds_to_nearest_and_keeps_nan() -> None:
    weight = torch.tensor([1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, torch.inf, torch.nan, 3.4e38, 0.0]).view(2, 4, 1, 1)
    packed = pack_weight(weight, [1, 1, 0, 4, 4], True).flatten()
    assert packed[:4].tolist() == [1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1.0]
    assert packed[4].isinf()
    assert packed[5].isnan()
    assert packed[7] == 0


@pytest.fixture
def emulated(gpu: list[int]) -> Iterator[list[str]]:
    """The compiled convolution serves CPU tensors, by executing its PTX; gives the names of the kernels that ran."""
    ran: list[str] = []

    def conv2d_fwd(x, weight, bias, residual, geometry, activation, slope, tf32, kernel, splits) -> Tensor:
        conv = Conv(x.shape[1], weight.shape[0], *(tuple(geometry[i : i + 2]) for i in (0, 2, 4, 6)))
        asked = problem_of("conv2d_bn", tuple(x.shape), x.dtype, x.device, (conv,))
        numbers, shape, function = plan_problem(asked, tf32), asked.output_shape(), (activation, slope)
        result = emulate.conv2d_packed(x, weight, bias, residual, numbers, shape, function, gpu, kernel, splits)
        ran.extend(result.kernels)
        return result.y

    library = torch.library.Library("resnet_fused_cuda", "IMPL")
    library.impl("conv2d_fwd", conv2d_fwd, "CPU")
    yield ran
    library._destroy()


def test_prepared_kernel_follows_the_tf32_switch_at_every_call(emulated: list[str], float32_precision: SimpleNamespace) -> None:
    asked = problem(dtype=torch.float32, device=CPU)
    folded = ConvParameters((torch.randn(24, 16, 3, 3) / 12,), (torch.randn(24),))
    x, residual = torch.randn(1, 16, 6, 7), torch.randn(1, 24, 6, 7)
    truth = torch.nn.functional.conv2d(x.double(), folded.weights[0].double(), folded.biases[0].double(), 1, 1)
    truth = (truth + residual).relu()
    kernel = get("cuda").prepare(asked, folded)
    for precision, name, allowed in (("tf32", "conv2d_fwd_tf32", 1e-3), ("ieee", "conv2d_fwd_f32", 2e-6)):
        float32_precision.fp32_precision = precision
        assert (kernel(x, residual) - truth).norm() / truth.norm() < allowed
        assert emulated[-1].startswith(name)


def test_prepared_variant_and_memory_format(emulated: list[str]) -> None:
    asked = problem(device=CPU, memory_format=torch.contiguous_format)
    folded = ConvParameters(((torch.randn(24, 16, 3, 3) / 12).half(),), (torch.randn(24).half(),))
    x, residual = torch.randn(1, 16, 6, 7).half(), torch.randn(1, 24, 6, 7).half()
    variant = get("cuda").plans(asked)[-1]
    y = get("cuda").prepare(asked, folded, variant)(x, residual)
    assert emulated[0] == variant
    assert y.is_contiguous()
    reference = get("reference").prepare(asked, folded)(x, residual)
    truth = torch.nn.functional.conv2d(x.double(), folded.weights[0].double(), folded.biases[0].double(), 1, 1)
    assert_as_good_as_stock(y, reference, (truth + residual.double()).relu())


@pytest.fixture
def emulated_norms() -> Iterator[list[str]]:
    """The compiled passes serve CPU tensors; gives the names of those that were called."""
    norm, called = emulate.Norm(), []

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        called.append("statistics")
        return norm.statistics(x)

    def apply(*arguments) -> Tensor:
        called.append("apply")
        return norm.activated(*arguments)

    def reduce(dy, x, y, mean, var, eps, keep_masked) -> tuple[Tensor, Tensor, Tensor]:
        called.append("reduce")
        dweight, dbias, masked = norm.backward_reduce(dy, x, y, mean, var, eps, keep_masked)
        return dweight, dbias, dy.new_empty(0) if masked is None else masked

    def apply_backward(dy, x, y, mean, var, weight, dweight, dbias, count, eps, keep_masked) -> tuple[Tensor, Tensor]:
        called.append("apply_backward")
        sums = None if dweight is None else (dweight, dbias, count)
        dx, masked = norm.backward_apply(dy, x, y, mean, var, weight, sums, eps, keep_masked)
        return dx, dy.new_empty(0) if masked is None else masked

    library = torch.library.Library("resnet_fused_cuda", "IMPL")
    passes = {"statistics": statistics, "apply_fwd": apply, "reduce_bwd": reduce, "apply_bwd": apply_backward}
    for name, function in passes.items():
        library.impl(f"bn_{name}", function, "CPU")
    yield called
    library._destroy()


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_bn_add_relu_trains_through_the_passes(
    format: torch.memory_format, emulated_norms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = BatchNorm().prepare(problem_of("bn_add_relu", (2, 8, 5, 6), torch.float32, GPU), NO_PARAMETERS, None)
    monkeypatch.setattr("resnet_fused.ops.batch_norm.passes", lambda x, residual, relu: passes)
    x, residual, dy = (torch.randn(2, 8, 5, 6).contiguous(memory_format=format) for _ in range(3))
    weight, bias = torch.randn(8), torch.randn(8)

    def gradients(op, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def stock(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True) + residual).relu()

    ours = gradients(lambda x, r, w, b: bn_add_relu(x, r, w, b, None, None, 1e-5, "")[0])
    for mine, theirs, truth in zip(ours, gradients(stock), gradients(stock, torch.float64), strict=True):
        assert_as_good_as_stock(mine, theirs, truth)
    # Other memory formats go through stock's ops.
    assert emulated_norms == (["statistics", "apply", "reduce", "apply_backward"] if format == torch.channels_last else [])
