"""examples/degradation.py, on two depths and few epochs: it runs to the end, and its networks learn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install 'resnet_fused[test]'")
SCRIPT = Path(__file__).parents[2] / "examples" / "degradation.py"


@pytest.fixture
def degradation():
    spec = importlib.util.spec_from_file_location("degradation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["degradation"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules["degradation"]


def test_runs_to_the_end(degradation, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    runs = degradation.main(["--depths", "8", "14", "--seeds", "1", "--epochs", "2", "--plot", str(plot)])
    assert [(r.depth, r.residual) for r in runs] == [(8, False), (8, True), (14, False), (14, True)]
    # Ten classes: guessing is wrong nine times in ten.
    assert all(run.train_error < 0.5 for run in runs)
    assert plot.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "training error" in shown
    assert "the same class for 449 of 449" in " ".join(shown.split())


def test_a_depth_that_is_none_says_which_are(degradation):
    with pytest.raises(ValueError, match="depth is 21"):
        degradation.network(21, True, 1)
