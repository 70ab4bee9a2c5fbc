"""`resnet-fused bench --minutes`: a run keeps to its time on any machine, and says what it left out."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from resnet_fused import cli
from resnet_fused.backends.processor import Processor
from resnet_fused.bench import budget as budgets
from resnet_fused.bench import inference, peaks, variants
from resnet_fused.bench.budget import Budget
from resnet_fused.bench.workloads import Workload

B1, B8 = (Workload("resnet18", batch, "float32", (64, 64)) for batch in (1, 8))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The budget's clock, which stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])
    return now


def test_a_workload_has_twice_its_share_of_what_is_left_and_never_more(clock):
    budget = Budget(4, 120.0)
    assert budget.begin() == 60.0
    clock[0] += 70
    assert budget.left() == -10.0
    assert budget.begin() == pytest.approx(100 / 3)
    clock[0] += 10
    assert budget.left() == pytest.approx(70 / 3)
    assert budget.begin() == 40.0, "half of them is left, and all of the time may be taken"
    clock[0] += 30
    assert budget.begin() == 10.0
    clock[0] += 100
    assert budget.begin() == 0.0


def test_without_a_limit_nothing_is_left_out():
    budget = Budget(1)
    budget.begin()
    budget.note_call(B8, 2, 1e6)
    budget.note_compiled(1e6)
    assert budget.too_slow(B8, 4) is None
    assert budget.rounds(B8, 4, most=5) == 5
    assert budget.for_compiling() == math.inf


def test_what_would_take_too_long_is_left_out_by_what_a_call_took(clock):
    budget = Budget(4, 120.0)
    budget.begin()
    budget.note_call(B1, 2, 1.0)
    assert budget.call(B8) == 4.0
    # Nine calls of each of three variants at least.
    assert budget.too_slow(B1, 3) is None
    assert budget.too_slow(B8, 3) == "left out: about 4.0 s a call"
    assert budget.too_slow(Workload("resnet18", 8, "bfloat16", (64, 64)), 3) is None, "of another dtype nothing is known"
    exhausted = Budget(1, 0.0)
    exhausted.begin()
    clock[0] += 1
    assert exhausted.too_slow(B1, 1) == "left out: no time"


def test_rounds_become_fewer_where_calls_take_long(clock):
    budget = Budget(1, 60.0)
    budget.begin()
    assert budget.rounds(B1, 4, most=5) == 5, "nothing is known"
    budget.note_call(B1, 1, 1.0)
    # Of 5 rounds each of the 4 variants is called 13 times, of 4 rounds 11 times, which are 44 s.
    assert budget.rounds(B1, 4, most=5) == 5
    clock[0] += 15
    assert budget.rounds(B1, 4, most=5) == 4
    clock[0] += 30
    assert budget.rounds(B1, 4, most=5) == budgets.FEWEST_ROUNDS


def test_compiling_may_take_half_of_what_is_left_and_no_more_than_it_took_before(clock):
    budget = Budget(1, 60.0)
    budget.begin()
    assert budget.for_compiling() == 30.0
    budget.note_compiled(20.0)
    assert budget.for_compiling() == 30.0
    clock[0] += 21
    assert budget.for_compiling() is None


def test_compiling_that_takes_too_long_is_ended_and_the_others_are_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(variants, "time_to_compile", lambda workload, most: asked.append(most))
    budget = Budget(2, 60.0)
    for start, end in (("left out: more than ", " s to compile"), ("left out: no time to compile", "")):
        compiled, ours = inference.compare(B1, [variants.COMPILE, variants.OURS], 0.1, budget=budget).results
        assert compiled.note.startswith(start)
        assert compiled.note.endswith(end)
        assert ours.calls > 0
    assert len(asked) == 1


def test_the_first_call_is_told_as_long_as_it_took_with_nothing_compiled(monkeypatch):
    monkeypatch.setattr(variants, "time_to_compile", lambda workload, most: 12.5)
    monkeypatch.setitem(variants._MAKERS, variants.COMPILE, variants._MAKERS[variants.EAGER])
    budget = Budget(1, 60.0)
    compiled, ours = inference.compare(B1, [variants.COMPILE, variants.OURS], 0.1, budget=budget).results
    assert compiled.first_call == 12.5 == budget.compiled
    assert ours.first_call < 12.5


CHILDREN = {
    "compiles": "from resnet_fused.bench import variants\n"
    "variants._MAKERS[variants.COMPILE] = variants._MAKERS[variants.EAGER]\n"
    "variants.compile_alone()",
    "endless": "import os, sys, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_process_tells_how_long_compiling_takes_and_can_be_ended(child, tmp_path, monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        variants.subprocess,
        "Popen",
        lambda command, **more: start([*command[:-1], CHILDREN[child]], cwd=tmp_path, **more),
    )
    found = variants.time_to_compile(B1, 5.0 if child == "endless" else 300.0)
    if child == "endless":
        assert found is None
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    else:
        assert 0 < found < 300


def test_a_compiler_that_fails_says_why_where_it_is_used(monkeypatch):
    monkeypatch.setattr(variants.sys, "executable", "/bin/false")
    assert variants.time_to_compile(B1, 60.0) == 0.0


def test_a_run_that_turns_out_slow_is_cut_between_calls(monkeypatch):
    """A machine may become slower while it is timed."""
    monkeypatch.setattr(Budget, "too_slow", lambda self, workload, variants: None)
    monkeypatch.setattr(Budget, "rounds", lambda self, workload, variants, most: 1000)
    comparison = inference.compare(B1, [variants.EAGER, variants.OURS], 1e-3, budget=Budget(1, 0.0))
    assert [result.calls for result in comparison.results] == [2, 2]


def test_what_is_left_out_is_in_the_lines_the_table_and_the_file(tmp_path, monkeypatch, capsys):
    def call(self, workload):
        return 1e-3 if workload.batch == 1 else 1e6

    monkeypatch.setattr(Budget, "call", call)
    given = [
        "--models",
        "resnet18",
        "--batches",
        "1,8",
        "--dtypes",
        "float32",
        "--size",
        "64",
        "--no-compile",
        "--seconds",
        "0.1",
    ]
    assert cli.main(["bench", *given, "--minutes", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    first, second = shown.splitlines()[:2]
    assert first.startswith("resnet18, batch 1, float32, 64×64: resnet_fused ")
    assert "stock channels_last" in first
    assert second == "resnet18, batch 8, float32, 64×64: resnet_fused: left out: about 1000000.0 s a call"
    (saved,) = tmp_path.glob("inference_*.json")
    timed, left = json.loads(saved.read_text())["comparisons"]
    assert all(result["calls"] > 0 for result in timed["results"])
    assert [result["note"] for result in left["results"]] == ["left out: about 1000000.0 s a call"]
    assert len([*tmp_path.glob("*.png")]) == 1


def test_without_anything_timed_there_is_no_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Budget, "call", lambda self, workload: 1e6)
    given = ["--models", "resnet18", "--batches", "1", "--dtypes", "float32", "--size", "64"]
    assert cli.main(["bench", *given, "--minutes", "1", "--out", str(tmp_path)]) == 0
    assert "left out" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


ZEN = {"Zen 3": ("avx2", "fma"), "Zen 5": ("avx2", "fma", "avx512f", "avx512_bf16")}


@pytest.mark.parametrize(
    ("generation", "limit", "reason"),
    [
        ("Zen 5", "", None),
        ("Zen 5", "AVX512_CORE_BF16", None),
        ("Zen 5", "avx2", "ONEDNN_MAX_CPU_ISA is AVX2"),
        ("Zen 3", "", "AMD EPYC (Zen 3) has no instructions for it"),
    ],
)
def test_bfloat16_is_left_out_where_it_would_be_emulated(generation, limit, reason, tmp_path, monkeypatch, capsys):
    numbers = {"Zen 3": (0x19, 1), "Zen 5": (0x1A, 2)}[generation]
    cpu = Processor("AMD EPYC", "AuthenticAMD", *numbers, "1", ZEN[generation])
    monkeypatch.setattr(peaks, "processor", lambda: cpu)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert peaks.emulated("bfloat16") == reason
    assert peaks.emulated("float32") is None
    seen = []

    def compare(workload, *rest):
        seen.append(workload.dtype)
        return inference.Comparison(workload, [inference.Result(variants.OURS, note="")])

    monkeypatch.setattr(inference, "compare", compare)
    given = ["bench", "--models", "resnet18", "--size", "64", "--batches", "1", "--out", str(tmp_path)]
    assert cli.main(given) == 0
    said = f"bfloat16 is left out, since {reason}; --dtypes bfloat16 measures it"
    assert (said in capsys.readouterr().out) == (reason is not None)
    assert seen == ["float32"] + ["bfloat16"] * (reason is None)
    assert cli.main([*given, "--dtypes", "bfloat16"]) == 0, "what is asked for is measured"
    assert seen[-1] == "bfloat16"


def test_an_unknown_cpu_may_have_the_instructions(monkeypatch):
    monkeypatch.setattr(peaks, "processor", lambda: Processor("a CPU"))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert peaks.emulated("bfloat16") is None
    assert peaks.emulated("float16") is None


def test_a_second_call_decides_where_the_first_was_slow(monkeypatch):
    """The first one prepares kernels and memory."""
    taken = iter([1e6, 1e-6])
    noted = []
    note = Budget.note_call

    def note_call(self, workload, images, seconds):
        noted.append(seconds)
        note(self, workload, images, next(taken))

    monkeypatch.setattr(Budget, "note_call", note_call)
    comparison = inference.compare(B1, [variants.OURS], 0.1, budget=Budget(1, 60.0))
    assert len(noted) == 2
    assert comparison.results[0].calls > 0
