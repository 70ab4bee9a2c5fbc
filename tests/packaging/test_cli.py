"""resnet-fused as a user runs it: help, info, a small benchmark, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused as rf
from resnet_fused import cli, env_report
from resnet_fused.backends.processor import processor
from resnet_fused.bench import files, timing


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "resnet_fused.cli", *arguments], capture_output=True, text=True)


def test_info_tells_what_a_bug_report_needs(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "CPU", "threads", "GPU", "reference", "onednn", "RESNET_FUSED_BACKEND", "TRITON_INTERPRET"):
        assert word in text
    for line in text.splitlines():
        cells = line.split()
        if len(cells) > 1 and cells[1] == "no":
            assert len(cells) > 4, f"no reason why {cells[0]} is missing"


class Installed:
    """A distribution's metadata, as an installer leaves it."""

    def __init__(self, folder: Path, tag: str, origin: str | None = None) -> None:
        self._folder, self._files = folder, {"WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n", "direct_url.json": origin}

    def locate_file(self, name: str) -> Path:
        return self._folder / name

    def read_text(self, name: str) -> str | None:
        return self._files[name]


HERE = Path(rf.__file__).parents[1]
EDITABLE = '{"dir_info": {"editable": true}, "url": "file://%s"}'
INSTALLATIONS = {
    "wheel": ([Installed(HERE, "py3-none-manylinux_2_28_x86_64")], "a wheel for manylinux_2_28_x86_64"),
    "source": ([Installed(HERE, "py3-none-linux_x86_64", '{"url": "file:///x"}')], "built from source for linux_x86_64"),
    "editable": ([Installed(Path("/site"), "py3-none-any", EDITABLE % HERE)], f"built from source, editable, in {HERE}"),
    "another-copy": ([Installed(Path("/site"), "py3-none-linux_x86_64")], f"not installed, in {HERE}"),
    "another-editable": ([Installed(Path("/site"), "py3-none-any", EDITABLE % "/elsewhere")], f"not installed, in {HERE}"),
    "nothing": ([], f"not installed, in {HERE}"),
}


@pytest.mark.parametrize("found, expected", INSTALLATIONS.values(), ids=INSTALLATIONS)
def test_info_tells_how_the_library_was_installed(found, expected, monkeypatch):
    monkeypatch.setattr(env_report.importlib.metadata, "distributions", lambda name: found)
    assert env_report.installation() == expected


def test_bench_writes_a_table_json_and_a_chart(tmp_path, capsys):
    arguments = ["bench", "--models", "resnet18", "--batches", "1", "--dtypes", "float32", "--size", "64", "--no-compile"]
    assert cli.main([*arguments, "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "resnet_fused" in text
    assert "stock channels_last" in text
    saved = json.loads((tmp_path / "inference_resnet18_batch1_float32_64.json").read_text())
    results = {r["variant"]: r for r in saved["comparisons"][0]["results"]}
    assert set(results) == {"stock eager", "stock channels_last", "resnet_fused"}
    for result in results.values():
        assert result["median"] > 0
        assert result["error"] < 1e-4
        assert result["images_per_second"] == pytest.approx(1e3 / result["median"])
    assert saved["machine"]["threads"] >= 1
    assert saved["machine"]["processor"] == str(processor())
    assert saved["machine"]["signature"] == processor().signature
    assert (tmp_path / "inference_resnet18_batch1_float32_64.png").read_bytes().startswith(b"\x89PNG")


NAMES = {
    "models": (
        ("inference", ["resnet18", "resnet50"], [1, 8], ["float32", "bfloat16"], "224", "cpu"),
        "inference_resnet18+resnet50_batch1+8_float32+bfloat16_224",
    ),
    "gpu": (
        ("layers", ["resnet50"], [256], ["float16"], "256x192", "cuda:1"),
        "layers_resnet50_batch256_float16_256x192_cuda-1",
    ),
    "many": (("zoo", ["timm/vgg11"] * 5, [1], ["float32"], "", "cpu"), "zoo_5models_batch1_float32"),
    "slash": (("zoo", ["timm/vgg11"], [1], ["float32"], "", "cpu"), "zoo_timm-vgg11_batch1_float32"),
}


@pytest.mark.parametrize("run, name", NAMES.values(), ids=NAMES)
def test_files_are_named_by_what_was_run(run, name):
    assert files.stem(*run) == name


def test_an_earlier_runs_files_stay(tmp_path):
    assert files.place(tmp_path, "zoo_a") == tmp_path / "zoo_a"
    (tmp_path / "zoo_a.json").touch()
    assert files.place(tmp_path, "zoo_a") == tmp_path / "zoo_a_2"
    (tmp_path / "zoo_a_2.md").touch()
    assert files.place(tmp_path, "zoo_a") == tmp_path / "zoo_a_3"
    assert files.place(tmp_path, "zoo") == tmp_path / "zoo"


def test_bench_shows_no_time_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    from resnet_fused.bench import inference, variants
    from resnet_fused.bench.workloads import Workload

    monkeypatch.setitem(variants._MAKERS, "wrong", lambda model, x: lambda: model(x) * 1.1)
    comparison = inference.compare(Workload("resnet18", 1, "float32", (64, 64)), ["wrong", variants.OURS], 0.1)
    wrong, ours = comparison.results
    assert wrong.calls == 0
    assert "wrong result" in wrong.note
    assert ours.calls > 0


def test_bench_shows_no_time_for_a_result_that_becomes_wrong(monkeypatch):
    """As that of a graph whose memory belongs to another."""
    from resnet_fused.bench import inference, variants
    from resnet_fused.bench.workloads import Workload

    def worsening(model, x):
        results = iter([model(x)] * 3)
        return lambda: next(results, torch.full((1, 1000), torch.nan))

    monkeypatch.setitem(variants._MAKERS, "worsening", worsening)
    (result,) = inference.compare(Workload("resnet18", 1, "float32", (64, 64)), ["worsening"], 0.1).results
    assert result.calls == 0
    assert "wrong result (relative error nan)" in result.note


def test_bench_goes_on_where_torch_compile_fails(monkeypatch):
    from resnet_fused.bench import inference, variants
    from resnet_fused.bench.workloads import Workload

    def compiler_missing(x):
        raise RuntimeError("Failed to find C++ compiler.\nmore")

    monkeypatch.setattr(torch, "compile", lambda model, options: compiler_missing)
    workload = Workload("resnet18", 1, "float32", (64, 64))
    compiled, ours = inference.compare(workload, [variants.COMPILE, variants.OURS], 0.1).results
    assert compiled.note == "torch.compile failed: RuntimeError: Failed to find C++ compiler."
    assert compiled.calls == 0 < ours.calls


def test_verify_passes(capsys):
    assert cli.main(["verify", "--models", "resnet18", "--size", "64"]) == 0
    assert "passed" in capsys.readouterr().out


BAD_OPTIONS = [
    (["bench", "--models", "resnet19"], "--models has 'resnet19'; it takes"),
    (["bench", "--models", ","], "--models has ','; it takes"),
    (["bench", "--batches", "0"], "--batches has '0'; it takes positive integers"),
    (["bench", "--batches", "1,,2"], "--batches has ''; it takes positive integers"),
    (["bench", "--dtypes", "float8"], "--dtypes has 'float8'; it takes float32, bfloat16, float16"),
    (["bench", "--dtypes", " "], "--dtypes has ' '; it takes float32, bfloat16, float16"),
    (["bench", "--size", "big"], "--size is 'big'; it takes pixels"),
    (["bench", "--size", "0"], "--size is '0'; it takes pixels as SIZE or HEIGHTxWIDTH, at least 32"),
    (["bench", "--threads", "0"], "--threads is 0; it must be at least 1"),
    (["bench", "--seconds", "-1"], "--seconds is -1; it must be a number above 0"),
    (["bench", "--seconds", "nan"], "--seconds is nan; it must be a number above 0"),
    (["bench", "--peers", "tensorrt"], "--peers has 'tensorrt'; it takes onnxruntime, openvino"),
    (["bench", "--out", "/proc/nope"], "--out is /proc/nope, where nothing can be written"),
    (["bench", "--models", "vit_b_16", "--size", "64"], "vit_b_16 can't run on 1 images of 64x64 pixels: Wrong image height!"),
    (["bench", "--layers", "--training"], "--layers and --training were both given"),
    (["bench", "--minutes", "0"], "--minutes is 0; it must be a number above 0"),
    (["bench", "--zoo", "--minutes", "1"], "--minutes and --zoo were both given; --minutes is for whole models"),
    (["bench", "--zoo", "--quick"], "--zoo and --quick were both given"),
    (["bench", "--zoo", "--training"], "--zoo and --training were both given"),
    (["bench", "--zoo", "--size", "64"], "--size is '64'; the zoo's models have sizes of their own"),
    (["bench", "--zoo", "--peers", "openvino"], "--peers is 'openvino'; the zoo's models have"),
    (["bench", "--zoo", "--models", "resnet18,resnet19"], "--models has 'resnet19', which fits no model of the zoo; it takes"),
    (["bench", "--training", "--models", "vgg11"], "--models has 'vgg11'; it takes resnet18"),
    (["bench", "--training", "--dtypes", "float16"], "--dtypes has 'float16'; it takes float32, bfloat16"),
    (["bench", "--training", "--size", "64x96"], "--size is 64x96; training takes square images"),
    (["bench", "--training", "--peers", "openvino"], "other engines don't train"),
    (["verify", "--size", "10"], "--size is '10'; it takes pixels"),
    (["verify", "--backend", "cudnnn", "--size", "64"], "backend is 'cudnnn'; it must be 'auto' or one of"),
    (["verify", "--device", "cpu", "--out", "/proc/nope/v.json"], "--out is /proc/nope, where nothing can be written"),
    (["tune", "--models", "vit_b_16", "--size", "32"], "vit_b_16 can't run on"),
    (["tune", "--device", "tpu"], "--device is 'tpu'; it takes cpu, cuda"),
    (["roofline", "--peak", "0"], "--peak is 0; it must be a number above 0"),
    (["roofline", "--bandwidth", "-3"], "--bandwidth is -3; it must be a number above 0"),
    (["roofline", "--plot", "/proc/nope/r.png"], "--plot is /proc/nope, where nothing can be written"),
]


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_device_that_is_not_there_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--device", "cuda"]) == 2
    assert "--device is cuda, and there is no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main([command, "--device", "cuda:1"]) == 2
    assert "--device is cuda:1, and there are 1 GPUs; take a smaller number" in capsys.readouterr().err


def test_what_is_for_the_cpu_is_refused_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", "--device", "cuda", "--threads", "2"]) == 2
    assert "--threads is for the CPU; leave it out with --device cuda" in capsys.readouterr().err
    assert cli.main(["bench", "--device", "cuda", "--peers", "openvino"]) == 2
    assert "--peers has 'openvino'; it takes max-autotune, tensorrt" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", BAD_OPTIONS, ids=[" ".join(arguments) for arguments, _ in BAD_OPTIONS])
def test_errors_have_no_traceback(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("variable, value", [("RESNET_FUSED_BACKEND", "fast"), ("RESNET_FUSED_LOG", "LOUD")])
def test_environment_is_checked_before_anything_runs(variable, value, monkeypatch, capsys):
    from resnet_fused import backends

    monkeypatch.setenv(variable, value)
    backends.environment_choice.cache_clear()
    try:
        assert cli.main(["info"]) == 2
    finally:
        monkeypatch.undo()
        backends.environment_choice.cache_clear()
    assert f"{variable} is {value!r}; it must be" in capsys.readouterr().err


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="it needs a backend that is not available: run without a GPU (CUDA_VISIBLE_DEVICES=)"
)
@pytest.mark.parametrize("command", ["bench", "verify"])
def test_a_backend_that_is_not_available_here(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resnet_fused.backends.environment_choice", lambda: "cuda")
    arguments = ["--models", "resnet18", "--size", "32"]
    more = ["--batches", "1", "--dtypes", "float32", "--no-compile"] if command == "bench" else []
    assert cli.main([command, *arguments, *more]) == 2
    assert "backend 'cuda' can't serve" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys):
    from resnet_fused.bench import options, variants

    find = options.importlib.util.find_spec
    missing = {"rich", "openvino"}
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    assert cli.main(["bench"]) == 2
    assert "bench needs rich, which is not installed; pip install 'resnet_fused[bench]'" in capsys.readouterr().err
    with pytest.raises(variants.Unavailable, match=r"openvino is not installed; pip install 'resnet_fused\[peers\]'"):
        variants.make("openvino", torch.nn.Identity(), torch.zeros(1))


def test_quick_and_training_have_defaults_that_options_override(monkeypatch, tmp_path):
    from resnet_fused.bench import inference, training

    seen = []

    def stop(workload, names, seconds, step, *rest):
        seen.append((str(workload), seconds))
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "compare", stop)
    monkeypatch.setattr(training, "compare", stop)
    for given in (["--quick"], ["--quick", "--models", "resnet34", "--size", "64"], ["--training", "--size", "96"]):
        assert cli.main(["bench", *given, "--out", str(tmp_path)]) == 130
    assert seen == [
        ("resnet18, batch 1, float32, 224×224", 4.0),
        ("resnet34, batch 1, float32, 64×64", 4.0),
        ("resnet50, batch 16, float32, 96×96", 24.0),
    ]


def test_help_teaches():
    wanted = {
        "bench": ("--quick", "--peers", "--models", "--out", "Example:", "--zoo", "is it never slower"),
        "verify": ("instead of models", "auto, reference, onednn", "resnet-fused verify --device cuda"),
        "tune": ("float32, bfloat16, float16, separated by commas", "RESNET_FUSED_CACHE_DIR", "Example:"),
        "accept": ("--minutes", "report.md", "Example:"),
        "roofline": ("--peak", "--bandwidth", "--plot", "a bound is no speed", "For a GPU that isn't at hand"),
    }
    for command, words in wanted.items():
        run = _run(command, "--help")
        assert run.returncode == 0
        for word in words:
            assert word in " ".join(run.stdout.split())


def test_interleaving_takes_turns(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    for _, result in timing.interleave(calls, seconds=0, rounds=3):
        samples = result
    assert order[:3] == ["a", "b", "c"]  # warm-up
    assert order[3:] == ["a", "a", "b", "b", "c", "c"] * 3
    assert all(len(s.times) == 3 for s in samples.values())


def test_a_variant_has_the_machine_to_itself_before_it_is_timed(monkeypatch):
    clock = iter(range(1000))  # each look at the clock takes a second
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 4.0)
    calls = []
    *_, (_, samples) = timing.interleave({"a": lambda: calls.append(None)}, seconds=0, rounds=1)
    assert samples["a"].times == [1e3]
    assert len(calls) == 1 + 4 + 1  # warm-up, the four seconds, the one that is timed


def test_median_and_spread():
    samples = timing.Samples([1.0, 2.0, 3.0, 4.0, 5.0])
    assert samples.median == 3
    assert samples.spread == pytest.approx(2 / 3)
