"""The Python of README and docs runs as it stands there, on small models and inputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from support.fake_tuning import fake_times

import resnet_fused as rf

ROOT = Path(__file__).parents[2]


def snippets() -> list[tuple[str, str]]:
    """File and text of each Python block; tests/training/test_processes.py runs those for torchrun."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (path.name, text) for path in files for text in re.findall(r"```python\n(?!# torchrun)(.*?)```", path.read_text(), re.S)
    ]


def test_all_snippets_are_found():
    assert [name for name, _ in snippets()] == ["README.md"] * 3 + ["elsewhere.md"] + ["training.md"] * 4


@pytest.mark.parametrize(("name", "text"), snippets(), ids=[f"{name}-{i}" for i, (name, _) in enumerate(snippets())])
def test_snippet_runs(name: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Weights aren't downloaded, and no candidate is timed.
    monkeypatch.setattr(torchvision.models, "resnet50", lambda weights: torchvision.models.resnet18())
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fake_times(monkeypatch, {})
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model = torchvision.models.ResNet(rf.BasicBlock, [1, 1, 1, 1])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, vectors = torch.randn(2, 8, 6, 6), torch.rand(4, 8).add(0.5).unbind()
    names = {"torch": torch, "torchvision": torchvision, "rf": rf, "model": model.eval(), "images": torch.randn(1, 3, 32, 32)}
    names |= {"x": x, "w": torch.randn(8, 8, 3, 3), **dict(zip(("mean", "var", "gamma", "beta"), vectors, strict=True))}
    exec(compile(text, name, "exec"), names)
