"""resnet-fused as a user runs it: help, info, a small benchmark, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from resnet_fused import cli
from resnet_fused.bench import timing


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "resnet_fused.cli", *arguments], capture_output=True, text=True)


def test_info_tells_what_a_bug_report_needs(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "CPU", "threads", "GPU", "reference", "onednn", "RESNET_FUSED_BACKEND"):
        assert word in text
    for line in text.splitlines():
        cells = line.split()
        if len(cells) > 1 and cells[1] == "no":
            assert len(cells) > 4, f"no reason why {cells[0]} is missing"


def test_bench_writes_a_table_json_and_a_chart(tmp_path, capsys):
    arguments = ["bench", "--models", "resnet18", "--batches", "1", "--dtypes", "float32", "--size", "64", "--no-compile"]
    assert cli.main([*arguments, "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "resnet_fused" in text
    assert "stock channels_last" in text
    saved = json.loads((tmp_path / "inference.json").read_text())
    results = {r["variant"]: r for r in saved["comparisons"][0]["results"]}
    assert set(results) == {"stock eager", "stock channels_last", "resnet_fused"}
    for result in results.values():
        assert result["median"] > 0
        assert result["error"] < 1e-4
        assert result["images_per_second"] == pytest.approx(1e3 / result["median"])
    assert saved["machine"]["threads"] >= 1
    assert (tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")


def test_bench_shows_no_time_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    from resnet_fused.bench import inference, variants
    from resnet_fused.bench.workloads import Workload

    monkeypatch.setitem(variants._MAKERS, "wrong", lambda model, x: lambda: model(x) * 1.1)
    comparison = inference.compare(Workload("resnet18", 1, "float32", (64, 64)), ["wrong", variants.OURS], 0.1)
    wrong, ours = comparison.results
    assert wrong.calls == 0
    assert "wrong result" in wrong.note
    assert ours.calls > 0


def test_verify_passes(capsys):
    assert cli.main(["verify", "--models", "resnet18", "--size", "64"]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "--models", "resnet19"], "--models has 'resnet19'; it takes"),
        (["bench", "--batches", "0"], "--batches has '0'; it takes positive integers"),
        (["bench", "--dtypes", "float8"], "--dtypes has 'float8'; it takes float32, bfloat16, float16"),
        (["bench", "--size", "big"], "--size is 'big'; it takes pixels"),
        (["bench", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["bench", "--peers", "tensorrt"], "--peers has 'tensorrt'; it takes onnxruntime, openvino"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_errors_have_no_traceback(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_teaches():
    run = _run("bench", "--help")
    assert run.returncode == 0
    for option in ("--quick", "--peers", "--models", "--out"):
        assert option in run.stdout
    assert "Example:" in run.stdout


def test_interleaving_takes_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    for _, result in timing.interleave(calls, seconds=0, rounds=3):
        samples = result
    assert order[:3] == ["a", "b", "c"]  # warm-up
    assert order[3:] == ["a", "a", "b", "b", "c", "c"] * 3
    assert all(len(s.times) == 3 for s in samples.values())


def test_median_and_spread():
    samples = timing.Samples([1.0, 2.0, 3.0, 4.0, 5.0])
    assert samples.median == 3
    assert samples.spread == pytest.approx(2 / 3)
