"""Tuning without a clock: candidates take the times that a test gives them."""

from __future__ import annotations

from resnet_fused import tuning
from resnet_fused.backends import ConvParameters, Problem, tuning_cache
from resnet_fused.backends.binding import is_divisible
from resnet_fused.tuning.in_model import InModel
from resnet_fused.tuning.progress import Progress


def fake_times(monkeypatch, seconds: dict[str, float], model: dict[str, float] | None = None) -> list[str]:
    """Candidates take the given times by name (1 s if not given), and the model takes their sum, or times of its own.

    Args:
        model: times of the model by what its kernels are: "stock", "by rule", "tuned".

    Returns:
        A list that the names of the candidates come into as they are measured.
    """
    measured: list[str] = []

    def measure(self, names, kept, show):
        measured.extend(name for own in names.values() for name in own)
        return {key: {name: [seconds.get(name, 1.0)] * 3 for name in own} for key, own in names.items()}

    def compare(self, choices, show):
        sums = {name: sum(seconds.get(one, 1.0) for one in chosen.values()) for name, chosen in choices.items()}
        return {name: [(model or sums)[name]] * 3 for name in choices}

    monkeypatch.setattr(InModel, "measure", measure)
    monkeypatch.setattr(InModel, "compare", compare)
    return measured


def tune_problem(problem: Problem, folded: ConvParameters) -> tuning.Result:
    """Tunes one problem as if a model posed it, by the times of `fake_times`, and records the result."""
    tasks = {tuning_cache.key(problem): tuning.Task(problem, folded, is_divisible(problem))}
    (result,), _, _ = tuning.tune_tasks(tasks, InModel(lambda: None, {}), Progress(1, False))
    tuning.record_results([result])
    return result
