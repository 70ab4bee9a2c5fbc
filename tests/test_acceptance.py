"""`resnet-fused verify --device`: wrong kernels are found, recorded, avoided, and used again once they are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnet_fused import acceptance, backends, cli
from resnet_fused.backends import Folded, Problem, records
from resnet_fused.backends.reference import Reference
from resnet_fused.trials import ENTRIES

CPU = torch.device("cpu")


class Faulty(Reference):
    """Serves one op by stock PyTorch, with a fault."""

    name = "faulty"
    fault: str | None = None

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.op == "conv2d_bn_relu" and problem.dtype == torch.float32 else "it serves one op"

    def prepare(self, problem: Problem, folded: Folded):
        kernel = super().prepare(problem, folded)

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
    monkeypatch.setattr(backends, "_BACKENDS", dict.fromkeys(found, ("", "")))
    monkeypatch.setattr(backends, "_AUTOMATIC_ORDER", tuple(found))
    monkeypatch.setattr(backends, "get", found.__getitem__)
    records.forget()
    yield backend
    records.forget()


def automatic_choice() -> str:
    entry = next(e for e in ENTRIES if e.op == "conv2d_bn_relu")
    return backends.resolve(Problem(entry.op, entry.shape, torch.float32, CPU, entry.convs), "auto").name


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("error", "RuntimeError: no such engine"), ("imprecise", "error "), ("unwritten", "a NaN or Inf appeared")],
)
def test_a_wrong_kernel_is_avoided_until_it_passes(faulty: Faulty, fault: str, reason: str) -> None:
    assert automatic_choice() == "faulty"
    faulty.fault = fault
    result = acceptance.accept(CPU)
    assert not result.passed
    assert {c.backend for c in result.checks} == {"faulty"}
    assert all(c.reason.startswith(reason) and c.fallback == "reference" for c in result.checks)
    assert "FAILED" in result.summary()
    assert automatic_choice() == "reference"

    faulty.fault = None
    assert acceptance.accept(CPU).passed
    assert automatic_choice() == "faulty"


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
