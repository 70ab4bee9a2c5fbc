"""`resnet-fused bench --zoo`: its list, its table and files, and what it makes of models that fail."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from resnet_fused import cli
from resnet_fused.bench import variants, zoo, zoo_models
from resnet_fused.bench.inference import Result
from resnet_fused.bench.zoo_models import ENTRIES, Entry

TINY = "own/cifar_resnet20"
PAIR = "cifar_resnet20,cifar_wide_resnet20"


def _bench(out, *arguments: str) -> int:
    return cli.main(["bench", "--zoo", "--batches", "1", "--seconds", "0.1", "--out", str(out), *arguments])


def _rows(out) -> dict[str, dict]:
    (saved,) = out.glob("zoo_*.json")
    return {row["workload"]["model"]: row for row in json.loads(saved.read_text())["rows"]}


def _page(out) -> str:
    (page,) = out.glob("zoo_*.md")
    return page.read_text()


class Failing(nn.Module):
    def forward(self, x):
        raise TypeError("no forward\nof a sort")


class Pyramid(nn.Module):
    """Its result is no tensor but a structure of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return {"fine": y, "coarse": [y.mean((2, 3))]}


def test_the_list_has_many_models_of_libraries_that_know_them():
    import timm
    import torchvision

    listed = {
        "timm": {*timm.list_models()},
        "torchvision": {*torchvision.models.list_models(), "resnet50_fpn", "resnet50_fpn_frozen"},
    }
    assert len(ENTRIES) >= 50
    for name, entry in ENTRIES.items():
        source, own = name.split("/")
        assert entry.name == name
        assert source == "own" or own in listed[source], name
        assert "," not in entry.family
        assert max(entry.size) >= 32
    assert sum(entry.residual for entry in ENTRIES.values()) >= 40
    assert not all(entry.residual for entry in ENTRIES.values())


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.startswith("own/")] + ["torchvision/resnet50_fpn_frozen"])
def test_what_the_zoo_makes_itself_runs(name):
    entry = ENTRIES[name]
    size = (64, 64) if len(entry.size) == 2 else entry.size
    model, x = zoo.ZooWorkload(name, 1, "float32", size, channels=entry.channels).make()
    with torch.no_grad():
        result = model(x)
    for y in result.values() if isinstance(result, dict) else [result]:
        assert y.isfinite().all()
        assert 1e-3 < y.abs().max() < 1e3, "batch norms have no statistics as after training"


def test_models_are_chosen_by_name_family_and_pattern():
    def names(patterns: str) -> list[str]:
        return [entry.name for entry in zoo_models.chosen(patterns)]

    assert names("resnet18") == ["torchvision/resnet18"]
    assert names("timm/resnet50d, own/unet,timm/resnet50d") == ["timm/resnet50d", "own/unet"]
    assert names("VGG") == ["torchvision/vgg11", "torchvision/vgg16_bn"]
    assert names("timm/regnetx_*") == ["timm/regnetx_004", "timm/regnetx_032"]
    assert len(zoo_models.chosen(None)) == len(ENTRIES)


def test_a_table_json_and_markdown(tmp_path, capsys):
    assert _bench(tmp_path, "--models", PAIR) == 0
    shown = capsys.readouterr().out
    rows = _rows(tmp_path)
    assert [*rows] == [TINY, "own/cifar_wide_resnet20"]
    for name, row in rows.items():
        assert f"{name}, batch 1, float32, 32×32: stock " in shown  # a line a model, where there is no terminal
        assert (row["fused"], row["left"], row["note"]) == (row["convolutions"], "", "")
        assert row["stock"] in (variants.EAGER, variants.CHANNELS_LAST)
        assert row["ratio"] == pytest.approx(row["stock_ms"] / row["ours_ms"])
        assert 0 < row["error"] < 1e-4
        assert math.isnan(row["compiled_ms"])
    page = _page(tmp_path)
    header, *lines = [line for line in page.splitlines() if line.startswith("|")]
    for column in ("model", "convolutions fused", "stock, ms", "stock's format", "ours, ms", "stock / ours", "in one format"):
        assert f"| {column} |" in header
    assert "compiled" not in header
    assert "note" not in header
    assert len(lines) == 1 + len(rows)
    assert all(line.count("|") == header.count("|") for line in lines)
    for text in (
        "Geometric mean over all models, batch 1, float32 (2)",
        "Geometric mean over residual families",
        "Slower than stock",
    ):
        assert text in page
        assert text in shown


def test_a_model_that_raises_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    def unmakeable() -> nn.Module:
        raise MemoryError("no memory")

    monkeypatch.setitem(ENTRIES, "own/unmakeable", Entry("own/unmakeable", "Test", unmakeable, (32, 32)))
    monkeypatch.setitem(ENTRIES, "own/failing", Entry("own/failing", "Test", Failing, (32, 32)))
    monkeypatch.setitem(ENTRIES, "own/pyramid", Entry("own/pyramid", "Test", Pyramid, (32, 32)))
    assert _bench(tmp_path, "--models", "test") == 0
    rows = _rows(tmp_path)
    assert rows["own/unmakeable"]["note"] == "MemoryError: no memory"
    assert rows["own/failing"]["note"] == "TypeError: no forward of a sort"
    assert rows["own/pyramid"]["note"] == ""
    assert rows["own/pyramid"]["ratio"] > 0
    assert "Without a ratio: own/unmakeable (batch 1), own/failing (batch 1)." in capsys.readouterr().out
    assert "| TypeError: no forward of a sort |" in _page(tmp_path)


def test_a_wrong_result_shows_no_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(variants._MAKERS, variants.OURS, lambda model, x: lambda: model(x) * (1 + 1e-4))
    assert _bench(tmp_path, "--models", TINY) == 0
    row = _rows(tmp_path)[TINY]
    assert math.isnan(row["ours_ms"])
    assert math.isnan(row["ratio"])
    assert row["stock_ms"] > 0
    assert "resnet_fused: wrong result (its relative error is 1.0e-04" in row["note"]
    assert "Without a ratio: own/cifar_resnet20" in capsys.readouterr().out


def test_one_wrong_tensor_of_several_shows_no_speed(monkeypatch):
    def spoilt(model, x):
        return lambda: {**model(x), "coarse": [model(x)["coarse"][0] * (1 + 1e-4)]}

    monkeypatch.setitem(variants._MAKERS, variants.OURS, spoilt)
    monkeypatch.setitem(ENTRIES, "own/pyramid", Entry("own/pyramid", "Test", Pyramid, (32, 32)))
    row = zoo.run(
        zoo.ZooWorkload("own/pyramid", 1, "float32", (32, 32)), [variants.EAGER, variants.CHANNELS_LAST, variants.OURS], 0.1
    )
    assert math.isnan(row.ratio)
    assert "wrong result" in row.note


def test_what_was_left_is_told_with_the_reason(monkeypatch):
    class Left(Pyramid):
        def forward(self, x):
            if float(x.sum()) > 1e9:  # a value decides what runs
                return x
            return self.bn(self.conv(x))

    monkeypatch.setitem(ENTRIES, "own/left", Entry("own/left", "Test", Left, (32, 32)))
    row = zoo.run(
        zoo.ZooWorkload("own/left", 1, "float32", (32, 32)), [variants.EAGER, variants.CHANNELS_LAST, variants.OURS], 0.1
    )
    assert (row.fused, row.convolutions) == (0, 1)
    assert row.left.startswith("forward of ")
    assert row.left.endswith("(1)")


def test_means_are_geometric_and_rows_of_torch_compile_are_shown():
    def row(name: str, stock: float, ours: float, compiled: float = math.nan) -> zoo.ZooRow:
        workload = zoo.ZooWorkload(name, 8, "float32")
        return zoo.ZooRow(workload, variants.EAGER, stock_ms=stock, ours_ms=ours, compiled_ms=compiled)

    rows = [row(TINY, 4.0, 1.0, 2.0), row("own/unet", 1.0, 4.0, 2.0), row("torchvision/vgg11", 3.0, math.nan)]
    found = {name: (count, stock, compiled) for name, count, stock, compiled in zoo.means(rows)}
    assert found == {
        "all models, batch 8, float32": (2, pytest.approx(1.0), pytest.approx(1.0)),
        "residual families, batch 8, float32": (1, pytest.approx(4.0), pytest.approx(2.0)),
    }
    assert "Slower than stock: own/unet (batch 8) 0.25." in zoo.summary(rows)
    assert "Slower than stock in the same memory format: none." in zoo.summary(rows)
    assert "Without a ratio: torchvision/vgg11 (batch 8)." in zoo.summary(rows)


def test_the_faster_of_stocks_formats_is_taken():
    workload = zoo.ZooWorkload(TINY, 1, "float32")
    eager, other, ours = (
        Result(variants.EAGER, 2.0, calls=5),
        Result(variants.CHANNELS_LAST, 3.0, calls=5),
        Result(variants.OURS, 1.0),
    )
    assert zoo.ZooRow.of(zoo.Comparison(workload, [eager, other, ours])).stock == variants.EAGER
    eager.calls, eager.median, eager.note = 0, math.nan, "wrong"
    assert zoo.ZooRow.of(zoo.Comparison(workload, [eager, other, ours])).stock_ms == 3.0


def test_a_library_that_is_missing_is_told_with_the_remedy(tmp_path, monkeypatch, capsys):
    find = zoo_models.importlib.util.find_spec
    monkeypatch.setattr(
        zoo_models.importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find(name, *rest)
    )
    assert _bench(tmp_path, "--models", f"{TINY},timm/resnet18d") == 0
    assert "timm is not installed, so 1 of 2 models are left out; pip install timm" in capsys.readouterr().out
    assert [*_rows(tmp_path)] == [TINY]
    assert _bench(tmp_path, "--models", "timm/*") == 2
    assert "models are left out; pip install timm" in capsys.readouterr().err
