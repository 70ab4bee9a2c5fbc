"""TF32: rounding to it, and results of operands rounded to it as a yardstick where kernels compute in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.problems import problem_of
from torch import Tensor

from resnet_fused import backends
from resnet_fused.backends import ConvParameters, Problem, tf32
from resnet_fused.backends.accuracy import ProblemCheck
from resnet_fused.backends.problem import Conv
from resnet_fused.backends.reference.backend import Reference
from resnet_fused.verification import cases as trials
from resnet_fused.verification import device as verify_device

CPU = torch.device("cpu")
CONV = Conv(64, 64, (3, 3), padding=(1, 1))


def cut_off(t: Tensor) -> Tensor:
    """What a tensor core reads of a float32 that wasn't rounded."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


class OnTensorCores(Reference):
    """Serves single convolutions as a tensor core would, with operands made TF32 by `convert`."""

    name = "on-tensor-cores"

    def __init__(self, convert) -> None:
        self.convert = convert

    def why_not(self, problem: Problem) -> str | None:
        return None if len(problem.convs) == 1 else "it serves single convolutions"

    def prepare(self, problem: Problem, folded: ConvParameters, plan: str | None = None):
        kernel = super().prepare(problem, ConvParameters((self.convert(folded.weights[0]),), folded.biases), plan)
        return lambda x, residual: kernel(self.convert(x), residual)


@pytest.fixture(params=[True, False], ids=["tf32", "float32"])
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken for a device whose kernels compute float32 in TF32."""
    if request.param:
        monkeypatch.setattr(tf32, "used", lambda problem: problem.dtype == torch.float32)
    return request.param


def test_rounds_to_nearest_with_ties_away_from_zero() -> None:
    largest = torch.finfo(torch.float32).max
    given = torch.tensor([1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 0.0, torch.inf, -torch.inf, largest])
    assert tf32.to_tf32(given).tolist() == [1, 1 + 2.0**-10, -1 - 2.0**-10, 1, 0, torch.inf, -torch.inf, torch.inf]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_stays_one_without_its_low_bits(bits: int) -> None:
    given = torch.tensor([bits]).to(torch.int32).view(torch.float32)
    assert cut_off(tf32.to_tf32(given)).isnan().all()


def test_no_cpu_computes_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="tf32"))
    problem = problem_of("conv2d_bn", (1, 64, 8, 8), torch.float32, CPU, (CONV,))
    assert problem.tf32_allowed()
    assert not tf32.used(problem)


def test_operands_of_every_convolution_of_a_block_are_rounded() -> None:
    problem = problem_of("basic_block", (1, 64, 8, 8), torch.float32, CPU, (CONV, CONV))
    x, folded, _ = trials.tensors(problem)
    first, second = (tf32.to_tf32(weight).double() for weight in folded.weights)
    y = torch.conv2d(tf32.to_tf32(x).double(), first, folded.biases[0].double(), padding=1).relu()
    y = torch.conv2d(tf32.to_tf32(y.float()).double(), second, folded.biases[1].double(), padding=1) + x
    assert torch.equal(tf32.exact(problem, folded)(x, None), y.relu())


@pytest.mark.parametrize("convert", [tf32.to_tf32, cut_off])
def test_verification_takes_right_tf32_kernels_where_they_are_used(
    convert, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"reference": backends.get("reference"), "on-tensor-cores": OnTensorCores(convert)}
    monkeypatch.setattr(backends, "get", found.__getitem__)
    float32 = trials.trials("on-tensor-cores", CPU, (torch.float32,))
    problems = [t for _, made in float32 for t in made if t.op.startswith("conv2d")]
    failed = [t.problem for t in problems if not verify_device.check_trial(t).passed]
    assert bool(failed) != (used and convert is tf32.to_tf32)


@pytest.mark.parametrize("convert", [tf32.to_tf32, cut_off])
def test_tuning_takes_right_tf32_kernels_where_they_are_used(convert, used: bool) -> None:
    problem = problem_of("conv2d_bn_add_relu", (5, 64, 12, 12), torch.float32, CPU, (CONV,))
    _, folded, _ = trials.tensors(problem)
    fault = ProblemCheck(problem, folded).fault(OnTensorCores(convert).prepare(problem, folded))
    assert (fault is None) == (used and convert is tf32.to_tf32)
