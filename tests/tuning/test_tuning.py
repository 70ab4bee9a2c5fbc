"""rf.tune and its records: what is tried, what is dropped, what is kept, and what a spoilt file does (nothing)."""

import io
import json
import logging
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.fake_tuning import fake_times, tune_problem
from support.fast_paths import report, served
from support.problems import problem_of
from torch import nn

import resnet_fused as rf
from resnet_fused import backends, tuning
from resnet_fused.backends import Activation, ConvParameters, Epilogue, Problem, library, tuning_cache
from resnet_fused.backends.problem import Conv
from resnet_fused.modules import BasicBlock
from resnet_fused.tuning import candidates, in_model, progress

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
CONV = Conv(16, 16, (3, 3), (1, 1), (1, 1))
PROBLEM = problem_of("conv2d_bn_add_relu", (2, 16, 6, 6), torch.float32, CPU, (CONV,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the tuning_cache."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(in_model, "_SECONDS", 0.0)
    tuning_cache.forget()
    yield tmp_path
    tuning_cache.forget()


def folded() -> ConvParameters:
    return ConvParameters((torch.randn(16, 16, 3, 3) / 12,), (torch.randn(16),))


def plain() -> nn.Module:
    """A model before fusion."""
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()).eval()


@pytest.fixture
def block() -> nn.Module:
    return BasicBlock(8, 8).eval()


def test_every_problem_of_a_model_is_measured_with_stock_among_the_candidates(block, cache):
    x = torch.randn(2, 8, 6, 6)
    expected = block(x).detach()
    result = tuning.tune(block, x, progress=False)
    assert [r.problem.label for r in result.results] == ["conv2d_bn_relu", "conv2d_bn_add_relu", "basic_block"]
    assert all("reference" in r.ms and r.chosen in r.ms and not r.dropped for r in result.results)
    assert result.path.parent == cache
    assert str(result).count("\n") == 6
    assert [*result.model_ms] == [*result.over_rule] == ["stock", "by rule", "tuned"]
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_the_fastest_is_chosen_from_then_on(monkeypatch):
    assert backends.resolve(PROBLEM, "auto").name != "reference"
    fake_times(monkeypatch, {"reference": 0.5})
    assert tune_problem(PROBLEM, folded()).chosen == "reference"
    assert backends.resolve(PROBLEM, "auto").name == "reference"
    fake_times(monkeypatch, {"onednn": 0.25})
    tune_problem(PROBLEM, folded())
    assert backends.resolve(PROBLEM, "auto").name == "onednn"


def test_the_rules_choice_stays_where_nothing_is_clearly_faster(monkeypatch):
    by_rule = candidates.by_rules(PROBLEM)
    assert by_rule.startswith("cpu")
    fake_times(monkeypatch, {"onednn": 0.98})
    assert tune_problem(PROBLEM, folded()).chosen == by_rule
    assert backends.resolve(PROBLEM, "auto").name == "cpu"


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        pytest.param({"stock": 3.0, "by rule": 2.0, "tuned": 1.9}, "onednn", id="tuned"),
        pytest.param({"stock": 3.0, "by rule": 2.0, "tuned": 2.0}, "cpu", id="no-faster-than-by-rule"),
        pytest.param({"stock": 3.0, "by rule": 2.0, "tuned": 2.1}, "cpu", id="slower-than-by-rule"),
        pytest.param({"stock": 1.0, "by rule": 2.0, "tuned": 1.5}, "reference", id="slower-than-stock"),
    ],
)
def test_what_the_whole_model_is_not_faster_with_is_not_taken(model, chosen, monkeypatch):
    fake_times(monkeypatch, {"onednn": 0.5}, model)
    result = tune_problem(PROBLEM, folded())
    assert result.chosen.partition(":")[0] == chosen == tuning_cache.choice(PROBLEM).backend
    assert result.chosen in (chosen, candidates.by_rules(PROBLEM))


def test_the_choice_is_told_with_the_ratios_that_it_was_made_by(block, monkeypatch):
    """Where the load changes between turns, medians of times may say the opposite of what the turns say."""
    fake_times(monkeypatch, {})
    times = {"stock": [2.0, 9.0, 2.2], "by rule": [1.0, 3.0, 1.2], "tuned": [1.3, 2.4, 0.9]}
    monkeypatch.setattr(in_model.InModel, "compare", lambda self, choices, show: times)
    result = tuning.tune(block, torch.randn(1, 8, 5, 5), progress=False)
    assert result.over_rule == pytest.approx({"stock": 2.0, "by rule": 1.0, "tuned": 0.8})
    last = str(result).splitlines()[-2:]
    assert last[0] == "The model as a whole, medians: 2200.000 ms stock, 1200.000 ms by rule, 1300.000 ms tuned."
    taken = "Taken: tuned, the least that is at 0.99 or below."
    assert last[1] == f"Time over that by rule in the same turn, medians: 2.000 stock, 0.800 tuned. {taken}"
    times["tuned"] = times["by rule"]
    result = tuning.tune(block, torch.randn(1, 8, 5, 5), progress=False)
    assert str(result).endswith("2.000 stock, 1.000 tuned. Taken: by rule, since nothing is at 0.99 or below.")


def test_a_whole_op_may_be_fastest_in_its_parts(block, monkeypatch):
    fake_times(monkeypatch, {"parts": 0.1})
    result = tuning.tune(block, torch.randn(1, 8, 5, 5), progress=False).results[-1]
    assert (result.problem.label, result.chosen) == ("basic_block", "parts")
    assert tuning_cache.choice(result.problem) == tuning_cache.Choice("parts")
    with torch.no_grad():
        block(torch.randn(1, 8, 5, 5))


def test_a_model_that_ran_before_uses_the_new_choice_and_keeps_nothing_of_the_others(monkeypatch):
    model = rf.fuse(plain())
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        model(x)
        assert report(model).packed_bytes > 0
        fake_times(monkeypatch, {"reference": 0.1})
        tuning.tune(model, x, progress=False)
        model(x)
    assert served(model) == [("conv2d_bn_relu", "reference")]
    assert report(model).packed_bytes == 4 * (16 * 16 * 9 + 16)  # the folded weight and bias, which stock's op reads


WRONG = {
    "wrong-result": (lambda y, x: y * 1.01, "relative error"),
    "drops-nan": (lambda y, x: y.nan_to_num(0.0), "NaN or Inf of stock's disappears"),
    "wrong-shape": (lambda y, x: y[:1], "of shape"),
    "wrong-type": (lambda y, x: y.double(), "float64"),
    "changes-its-input": (lambda y, x: x.add_(1) * 0 + y, "changes its input"),
}


@pytest.mark.parametrize(("spoil", "reason"), [pytest.param(*case, id=name) for name, case in WRONG.items()])
def test_a_wrong_candidate_is_dropped_loudly_recorded_and_not_tried_again(spoil, reason, monkeypatch, caplog):
    onednn, tried = backends.get("onednn"), []
    prepare = onednn.prepare

    def spoilt(problem, folded, plan):
        tried.append(problem)
        kernel = prepare(problem, folded, plan)
        return lambda x, residual: spoil(kernel(x, residual), x)

    monkeypatch.setattr(onednn, "prepare", spoilt)
    fake_times(monkeypatch, {"onednn": 0.01})
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        result = tune_problem(PROBLEM, folded())
    assert result.chosen != "onednn"
    assert reason in result.dropped["onednn"]
    assert "rf.tune drops onednn" in caplog.text
    assert reason in tuning_cache.dropped(PROBLEM)["onednn"]
    assert "onednn" in tune_problem(PROBLEM, folded()).dropped
    assert len(tried) == 1


FAILURES = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to find C compiler"), OSError("disk is full")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_a_candidate_that_fails_is_left_out_and_tried_again(failure, monkeypatch, caplog):
    onednn = backends.get("onednn")
    prepare = onednn.prepare

    def fail(problem, folded, plan):
        raise failure

    monkeypatch.setattr(onednn, "prepare", fail)
    fake_times(monkeypatch, {"onednn": 0.01})
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        result = tune_problem(PROBLEM, folded())
    assert result.chosen != "onednn"
    assert str(failure) in result.failed["onednn"]
    assert "rf.tune leaves out onednn" in caplog.text
    assert not result.dropped
    assert not tuning_cache.dropped(PROBLEM)
    monkeypatch.setattr(onednn, "prepare", prepare)
    assert tune_problem(PROBLEM, folded()).chosen == "onednn"


def test_records_of_another_build_of_the_library_are_others(tmp_path, monkeypatch):
    paths = set()
    for content in (b"one build", b"another build", None):
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        (tmp_path / "resnet_fused_cpu.so").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "resnet_fused_cpu.so").write_bytes(content)
        library.digest.cache_clear()
        tuning_cache.machine.cache_clear()
        paths.add(tuning_cache.file_of(CPU))
    monkeypatch.undo()
    library.digest.cache_clear()
    tuning_cache.machine.cache_clear()
    assert len(paths) == 3


def test_records_of_a_cpu_of_the_same_name_are_others(monkeypatch):
    """A home folder may be shared by virtual machines that call a Zen 3 and a Zen 5 alike."""
    paths = set()
    own = tuning_cache.processor()
    changes = (
        {},
        {"family": own.family + 1},
        {"model": own.model + 1},
        {"stepping": f"{own.stepping}9"},
        {"cores": own.cores + 1},
        {"caches": f"{own.caches}, L9 1M"},
        {"instruction_sets": ()},
    )
    for change in changes:
        monkeypatch.setattr(tuning_cache, "processor", lambda change=change: replace(own, **change))
        tuning_cache.machine.cache_clear()
        paths.add(tuning_cache.file_of(CPU))
    monkeypatch.undo()
    tuning_cache.machine.cache_clear()
    assert len(paths) == len(changes)


@pytest.mark.parametrize(("hip", "architecture"), [(None, "9.0"), ("6.4", "gfx942")])
def test_the_architecture_is_a_compute_capability_or_amds_name(hip, architecture, monkeypatch):
    properties = SimpleNamespace(
        name="chip", major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942" if hip else "chip"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tuning_cache.machine.__wrapped__(torch.device("cuda", 0))["architecture"] == architecture


def valid() -> dict:
    entry = {"backend": "reference", "variant": None, "ms": {}, "dropped": {}}
    return {"format": 1, "machine": tuning_cache.machine(CPU), "choices": {tuning_cache.key(PROBLEM): entry}}


SPOILT = {
    "empty": "",
    "cut-off": json.dumps(valid())[:-9],
    "no-table": "[1, 2]",
    "no-choices": json.dumps({**valid(), "choices": 3}),
    "older-format": json.dumps({**valid(), "format": 0}),
    "another-machine": json.dumps({**valid(), "machine": {**tuning_cache.machine(CPU), "torch": "1.0"}}),
    "bottomless": "[" * 100_000,
    "no-text": b"\xff\xfe\x00\x80",
}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in SPOILT.items()])
def test_a_spoilt_file_is_ignored_with_a_warning(content, caplog):
    path = tuning_cache.file_of(CPU)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert tuning_cache.choice(PROBLEM) is None
    assert str(path) in caplog.text
    assert backends.resolve(PROBLEM, "auto").name in backends.candidates(PROBLEM)


ENTRIES = {
    "no-entry": 7,
    "no-backend": {"variant": "a"},
    "unknown-backend": {"backend": "os.system"},
    "not-here": {"backend": "cudnn"},
    "wrong-types": {"backend": ["reference"], "variant": {}, "dropped": 3},
}


@pytest.mark.parametrize("entry", [pytest.param(entry, id=name) for name, entry in ENTRIES.items()])
def test_a_spoilt_entry_changes_nothing(entry):
    before = backends.resolve(PROBLEM, "auto").name
    tuning_cache.file_of(CPU).write_text(json.dumps({**valid(), "choices": {tuning_cache.key(PROBLEM): entry}}))
    tuning_cache.forget()
    assert backends.resolve(PROBLEM, "auto").name == before
    assert tuning_cache.dropped(PROBLEM) == {}


def test_a_kernel_that_verify_rejected_is_rejected_with_a_function_after_it():
    key = tuning_cache.rejection_key("onednn", "conv2d_bn_add", "float32")
    tuning_cache.record(CPU, {key: {"backend": "onednn", "rejected": "wrong"}})
    silu = Epilogue(residual=True, activation=Activation.SILU)
    assert tuning_cache.rejected(Problem.of(CONV, PROBLEM.shape, torch.float32, CPU, silu), "onednn") == "wrong"
    assert tuning_cache.rejected(PROBLEM, "onednn") is None


def test_records_of_two_writers_are_merged(cache):
    other = problem_of("add_relu", (1, 2, 3, 4), torch.float32, CPU)
    for problem in (PROBLEM, other):
        tuning_cache.record(CPU, {tuning_cache.key(problem): {"backend": "reference"}})
    assert tuning_cache.choice(PROBLEM) == tuning_cache.choice(other) == tuning_cache.Choice("reference")
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_results_are_given_where_they_can_not_be_kept(block, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        result = tuning.tune(block, torch.randn(1, 8, 5, 5), progress=False)
    assert result.path is None
    assert "RESNET_FUSED_CACHE_DIR" in caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(BasicBlock(16, 16).train(), "model.eval()", id="training"),
        pytest.param(nn.Conv2d(16, 16, 3).eval(), "no fused op", id="nothing-fused"),
        pytest.param(rf.fuse(plain(), backend="onednn"), "without a backend of your choice", id="explicit-backend"),
    ],
)
def test_says_why_it_can_not_tune(model, message):
    with pytest.raises(ValueError, match=message):
        tuning.tune(model, torch.randn(1, 16, 5, 5))


def test_a_terminal_sees_every_candidate_go_by(block, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((200, 24)))
    tuning.tune(block, torch.randn(1, 8, 5, 5))
    shown = terminal.getvalue()
    assert ": onednn" in shown
    assert "2/3" in shown
    assert shown.endswith("tuned 3 of 3 problems\n")
