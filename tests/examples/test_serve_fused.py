"""The example of serving runs and keeps the answer."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_serve_fused(capsys):
    runpy.run_path(str(EXAMPLES / "serve_fused.py"))["main"](["--model", "resnet18", "--size", "64"])
    text = capsys.readouterr().out
    assert "passed" in text
    assert "20 of 20 convolutions fused" in text
    assert "same answer: True" in text
