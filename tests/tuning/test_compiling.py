"""Candidates of Triton are compiled in processes before they are measured, here by programs in the compiler's place."""

from __future__ import annotations

import sys

import pytest
import torch
from support.problems import problem_of

from resnet_fused import tuning
from resnet_fused.backends import ConvParameters, Problem, tuning_cache
from resnet_fused.backends.problem import Conv
from resnet_fused.tuning import candidates, compiling

CONV = Conv(16, 16, (1, 1))
PROBLEM = problem_of("conv2d_bn_relu", (1, 16, 8, 8), torch.float16, torch.device("cuda", 0), (CONV,))
CANDIDATES = [(PROBLEM, f"variant {i}") for i in range(16)]

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)


def test_every_candidate_is_compiled_once_and_the_rest_estimated(monkeypatch, tmp_path):
    program = f"""
import os, pickle, sys
for problem, variant in pickle.load(sys.stdin.buffer):
    assert problem.shape == (1, 16, 8, 8)
    open(os.path.join({str(tmp_path)!r}, variant), "x").close()  # fails where it was compiled before
    print("done", flush=True)
"""
    monkeypatch.setattr(compiling, "PROGRAM", program)
    shown: list[str] = []
    compiling.compile_ahead(CANDIDATES, shown.append)
    assert {path.name for path in tmp_path.iterdir()} == {variant for _, variant in CANDIDATES}
    assert shown[0] == "compiling 16 candidates in 4 processes"
    assert shown[-1] == "compiling 16 of 16 candidates, about 0 s left"


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", "print('done')"])
def test_processes_that_fail_do_no_harm(program, monkeypatch):
    monkeypatch.setattr(compiling, "PROGRAM", program)
    compiling.compile_ahead(CANDIDATES, lambda text: None)


def test_few_candidates_are_left_to_this_process(monkeypatch):
    monkeypatch.setattr(compiling.subprocess, "Popen", None)
    compiling.compile_ahead(CANDIDATES[:7], lambda text: None)


def test_an_error_of_the_compiler_costs_its_candidate_only(monkeypatch, capsys):
    def prepare(problem: Problem, folded: ConvParameters, name: str) -> None:
        print("words of the compiler")
        assert folded.weights[0].shape == (16, 16, 1, 1)
        if name == "triton:variant 1":
            raise RuntimeError("out of shared memory")

    class Input:
        buffer = None

    on_cpu = problem_of("conv2d_bn_relu", (1, 16, 8, 8), torch.float32, torch.device("cpu"), (CONV,))
    monkeypatch.setattr(compiling, "prepare", prepare)
    monkeypatch.setattr(compiling.pickle, "load", lambda file: [(on_cpu, f"triton:variant {i}") for i in range(3)])
    monkeypatch.setattr(sys, "stdin", Input())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    stdout = sys.stdout
    try:
        compiling.work()
    finally:
        sys.stdout = stdout
    printed = capsys.readouterr()
    assert printed.out == "done\n" * 3
    assert "variant 1" in printed.err
    assert "out of shared memory" in printed.err


def test_only_what_triton_has_to_compile(monkeypatch):
    monkeypatch.setattr(candidates, "names", lambda problem: ["reference", "cuda:a", "triton:b", "triton:c"])
    monkeypatch.setattr(tuning_cache, "dropped", lambda problem: {"triton:b": "it was wrong"})
    on_cpu = problem_of("conv2d_bn_relu", (1, 16, 8, 8), torch.float32, torch.device("cpu"), (CONV,))
    nothing = ConvParameters((), ())
    tasks = {str(problem): tuning.Task(problem, nothing, False) for problem in (PROBLEM, on_cpu)}
    assert tuning.to_compile(tasks) == [(PROBLEM, "triton:c")]
