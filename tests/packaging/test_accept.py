"""resnet-fused accept: its budget, what it keeps of a step that was stopped, and its page, with steps that a test makes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from resnet_fused import accept, accept_page, cli
from resnet_fused.accept_page import Outcome, Record, Step


def python(*lines: str) -> str:
    """A program in the place of the command's own."""
    return "\n".join(lines)


@pytest.fixture
def steps(monkeypatch):
    """Gives the plan: titles with programs, which run in the place of `resnet-fused`."""

    def set_plan(programs: dict[str, str], shares: dict[str, float] | None = None) -> None:
        plan = [Step(title, ("bench", "--out", title.lower()), (shares or {}).get(title, 1.0)) for title in programs]
        monkeypatch.setattr(accept, "plan", lambda device, seconds: plan)
        monkeypatch.setattr(accept, "PROGRAM", "import sys\nexec(" + repr(programs) + "[sys.argv[3].capitalize()])")

    return set_plan


def save(folder: str, name: str, content: dict) -> str:
    return (
        f"import json, os; os.makedirs({folder!r}, exist_ok=True); json.dump({content!r}, open({folder + '/' + name!r}, 'w'))"
    )


def test_a_step_that_fails_or_takes_too_long_costs_only_itself(steps, tmp_path, capsys):
    steps(
        {
            "Killed": "import os; os.kill(os.getpid(), 9)",
            "Endless": python(
                "import subprocess, sys, time",
                "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
                "open('child', 'w').write(str(child.pid))",
                save("endless", "inference_resnet50.json", inference(ours=1.0, other=3.0)),
                "time.sleep(60)",
            ),
            "Good": "print('what it printed')",
        },
        shares={"Endless": 0.2},
    )
    start = time.monotonic()
    assert accept.main("cpu", 0.5, tmp_path) == 0
    assert time.monotonic() - start < 20
    page = (tmp_path / "report.md").read_text()
    assert "it ended with status -9; see killed.txt" in page
    assert "it was stopped after 6 s; what it had written by then counts" in page
    assert "**resnet_fused**" in page
    assert (tmp_path / "good.txt").read_text() == "what it printed\n"
    child = int((tmp_path / "child").read_text())
    # What the step had started was stopped with it. A dead process may still wait for its parent.
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "Z" in status.read_text().split("State:")[1].split()[0]
    assert "faster than every other way that was measured in 1 of 1 workloads" in capsys.readouterr().out


def test_nothing_is_begun_without_time_and_old_results_do_not_count(steps, tmp_path):
    (tmp_path / "good").mkdir()
    earlier, own = tmp_path / "good" / "inference_resnet50.json", tmp_path / "inference_mine.json"
    for path in (earlier, own):
        path.write_text(json.dumps(inference(ours=1.0, other=3.0)))
    steps({"Good": "raise SystemExit(3)"})
    record = accept.run("cpu", 0.05, tmp_path)
    assert [(o.fault, o.seconds) for o in record.outcomes] == [("there was no time left for it", 0.0)]
    page = (tmp_path / "report.md").read_text()
    assert "Fast: not known, since no model was timed." in page
    assert "Right: not known, since the kernels were not verified." in page
    assert not earlier.exists()
    assert own.exists(), "what a user has in the page's folder stays"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_steps_are_commands_that_a_user_can_run(device):
    plan = accept.plan(device, 480.0)
    assert [step.arguments[0] for step in plan[:3]] == ["info", "verify", "bench"]
    assert len({step.log for step in plan}) == len(plan)
    benches = [step for step in plan if step.arguments[0] == "bench"]
    assert len({step.folder for step in benches}) == len(benches)
    for step in plan:
        arguments = cli.make_parser().parse_args(step.arguments)
        assert arguments.run is not None
        assert 0 < step.share <= 1


def test_a_device_that_is_not_there_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["accept", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device is cuda, and there is no GPU here" in capsys.readouterr().err
    assert cli.main(["accept", "--minutes", "0", "--out", str(tmp_path)]) == 2
    assert "--minutes is 0; it must be a number above 0" in capsys.readouterr().err


def inference(ours: float, other: float, **gpu: float) -> dict:
    """What bench saves of one workload."""

    def result(variant: str, ms: float) -> dict:
        known = {"variant": variant, "median": ms, "spread": 0.01, "calls": 9, "error": 1e-3, "first_call": 0.5, "note": ""}
        return {**known, "gpu": ms / 2, "images_per_second": 1e3 / ms, "time_over_ours": ms / ours}

    machine = {"processor": "a CPU", **({"gpu": "NVIDIA H100"} if gpu else {})}
    workload = {"model": "resnet50", "batch": 1, "dtype": "float16"}
    results = [result("stock eager", other), result("resnet_fused", ours)]
    return {"machine": machine, "comparisons": [{"workload": workload, "bound": gpu.get("bound"), "results": results}]}


def finished(tmp_path: Path, **files: dict) -> Record:
    """A record of steps that saved these files, each in a folder of its own."""
    record = Record("cuda", 8.0)
    for i, (name, content) in enumerate(files.items()):
        step = Step(f"Step {i}", ("bench", "--out", f"folder{i}"))
        (tmp_path / step.folder).mkdir()
        (tmp_path / step.folder / f"{name}_resnet50.json").write_text(json.dumps(content))
        record.outcomes.append(Outcome(step, 1.0))
    return record


def test_the_page_says_what_is_not_fast(tmp_path):
    layer = {"layer": "conv2d_bn(64 1×1)", "input": [1, 64, 56, 56], "count": 3, "chosen": "cuda", "bound": 0.1}
    timed = {"workload": inference(1, 1)["comparisons"][0]["workload"]}
    timed["layers"] = [
        {**layer, "milliseconds": {"auto": 0.2, "cuda": 0.2, "cudnn": 0.15}},
        {**layer, "layer": "conv2d_bn(slow)", "milliseconds": {"auto": 0.4}},
    ]
    slower = inference(ours=1.0, other=0.8, bound=0.25)
    record = finished(tmp_path, inference=slower, layers={"machine": {}, "comparisons": [timed]})
    page = accept_page.page(record, tmp_path)
    assert "# resnet_fused on NVIDIA H100" in page
    assert "- Not the fastest: resnet50, batch 1, float16 (0.80)." in page
    assert "**50%**" in page  # 0.25 of the 0.5 ms that the GPU worked
    rows = [line for line in page.splitlines() if "conv2d_bn(" in line]
    assert "slow" in rows[0], "those which lose most come first"
    assert "| 50% | 0.300 |" in rows[1]


def test_the_page_says_what_is_wrong(tmp_path, monkeypatch):
    check = {"backend": "cuda", "kernel": "a|b", "dtype": "float16", "problem": "3x3", "fallback": "reference"}
    verified = {
        "checks": [{**check, "passed": True, "reason": ""}, {**check, "passed": False, "reason": "error 1e-1"}],
        "unavailable": {"triton": "there was no time left"},
    }
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    page = accept_page.page(Record("cuda", 8.0), tmp_path)
    assert "- Right: 2 checks of kernels against float64, 1 failed. Not verified: 1 (below)." in page
    assert "| cuda | a\\|b | 3x3 | error 1e-1 | reference |" in page
    assert "| triton | there was no time left |" in page
    monkeypatch.setattr(accept, "plan", lambda device, seconds: [])
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    assert accept.main("cpu", 1.0, tmp_path) == 1
