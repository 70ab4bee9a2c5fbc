"""`resnet-fused verify --device`: wrong kernels are found, recorded, avoided, and used again once they are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from resnet_fused import backends, cli
from resnet_fused.backends import ConvParameters, Problem, tuning_cache
from resnet_fused.backends.reference.backend import Reference
from resnet_fused.verification import cases as trials
from resnet_fused.verification import device as verify_device

CPU = torch.device("cpu")


class Faulty(Reference):
    """Serves one op by stock PyTorch, with a fault."""

    name = "faulty"
    fault: str | None = None

    def why_not(self, problem: Problem) -> str | None:
        return None if problem.label == "conv2d_bn_relu" and problem.dtype == torch.float32 else "it serves one op"

    def prepare(self, problem: Problem, folded: ConvParameters, plan: str | None = None):
        kernel = super().prepare(problem, folded, plan)

        def faulty(x, residual):
            y = kernel(x, residual)
            if self.fault == "error":
                raise RuntimeError("no such engine\nmore")
            if self.fault == "imprecise":
                return y.bfloat16().float()
            if self.fault == "unwritten":
                y[-1, -1, -1, -1] = torch.nan
            return y

        return faulty


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Faulty:
    """The backend "faulty", the first that the automatic choice asks, beside the reference alone."""
    backend = Faulty()
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    found = {"faulty": backend, "reference": backends.get("reference")}
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(found, ("", "")))
    monkeypatch.setattr(backends, "AUTOMATIC_ORDER", tuple(found))
    monkeypatch.setattr(backends, "get", found.__getitem__)
    tuning_cache.forget()
    yield backend
    tuning_cache.forget()


def automatic_choice() -> str:
    problem = next(p for p in trials.problems(torch.float32, CPU) if p.label == "conv2d_bn_relu")
    return backends.resolve(problem, "auto").name


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("error", "RuntimeError: no such engine"), ("imprecise", "its relative error "), ("unwritten", "a NaN or Inf appears")],
)
def test_a_wrong_kernel_is_avoided_until_it_passes(faulty: Faulty, fault: str, reason: str) -> None:
    assert automatic_choice() == "faulty"
    faulty.fault = fault
    result = verify_device.check_kernels(CPU)
    assert not result.passed
    assert {c.backend for c in result.checks} == {"faulty"}
    assert all(c.reason.startswith(reason) and c.fallback == "reference" for c in result.checks)
    assert "FAILED" in result.summary()
    assert automatic_choice() == "reference"

    faulty.fault = None
    assert verify_device.check_kernels(CPU).passed
    assert automatic_choice() == "faulty"


def test_after_a_kernel_that_spoils_the_gpu_nothing_else_is_recorded(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(verify_device.check_kernels(CPU).checks) > 1
    faulty.fault = "error"
    monkeypatch.setattr(verify_device, "why_unusable", lambda device: "AcceleratorError: an illegal memory access")
    result = verify_device.check_kernels(CPU)
    (culprit,) = result.checks
    assert culprit.reason.endswith("it leaves the GPU unusable")
    ((what, why),) = result.unavailable
    assert what == "faulty: further kernels"
    assert "an illegal memory access" in why


@pytest.mark.parametrize("where", ["stock", "kernel"])
def test_want_of_memory_is_no_kernels_fault(where: str, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "stock":
        monkeypatch.setattr(trials, "tensors", fail)
    else:
        monkeypatch.setattr(Faulty, "prepare", fail)
    result = verify_device.check_kernels(CPU)
    assert result.passed
    assert not result.checks
    assert {why for _, why in result.unavailable} == {"OutOfMemoryError: CUDA out of memory"}
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("ends", "fault"),
    [("kill -9 $$", "the process that checked them ended with status -9"), ("exec sleep 60", "there was no time left")],
)
def test_what_a_process_had_checked_before_its_end_counts(
    ends: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = verify_device.Check("triton", "a", "add_relu", "float32", "a problem", 0.0, 0.0, "")
    python = tmp_path / "python"
    lines = f"{json.dumps(dataclasses.asdict(made))}\n{{"  # the second is cut off
    python.write_text(f"#!/bin/sh\nprintf '%s' '{lines}' > \"$6\"\nexec 2>&-\n{ends}\n")
    python.chmod(0o755)
    monkeypatch.setattr(verify_device.sys, "executable", str(python))
    ((name, checks, skipped),) = verify_device.check_in_processes(["triton"], torch.device("cuda", 0), 2.0)
    assert name == "triton"
    assert checks[0] == made
    assert skipped[0] == ("triton: further kernels in float32", fault)


def test_the_process_of_a_backend() -> None:
    """It finds the package, and gives what the same checks give here."""
    checks, skipped = verify_device.checks_of_process("onednn", torch.float32, CPU, None)
    assert not skipped
    assert [c.problem for c in checks] == [c.problem for c in verify_device.run_checks("onednn", CPU, (torch.float32,))[0]]
    assert all(c.passed for c in checks)


def test_command(faulty: Faulty, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report" / "verify.json"
    assert cli.main(["verify", "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["passed"]
    assert {"error", "stock", "reason", "fallback", "problem"} <= set(content["checks"][0])
    faulty.fault = "imprecise"
    assert cli.main(["verify", "--device", "cpu", "--out", str(out)]) == 1
    assert "reference" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is verified then")
def test_without_a_gpu_it_says_so_and_verifies_the_rest(
    faulty: Faulty, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "--device", "cuda", "--out", str(tmp_path / "verify.json")]) == 0
    printed = capsys.readouterr().out
    assert "GPU kernels are NOT verified" in printed
    assert "passed on cpu" in printed


def test_a_wrong_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--device", "tpu"]) == 2
    assert "--device is 'tpu'; it takes cpu, cuda, or one GPU as cuda:1" in capsys.readouterr().err
