"""rf.tune on the Triton backend: every plan is tried, a wrong one is dropped, and a recorded one is used."""

import logging

import pytest
import torch
from support.fake_tuning import fake_times, tune_problem
from support.problems import problem_of

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.backends import ConvParameters, tuning_cache
from resnet_fused.backends.problem import Conv
from resnet_fused.backends.triton import configs, conv2d

PROBLEM = problem_of("conv2d_bn_add_relu", (1, 64, 3, 3), torch.float16, torch.device("cpu"), (Conv(64, 24, (1, 1)),))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    tuning_cache.forget()
    with rf.use_backend("auto"):
        yield
    tuning_cache.forget()


def folded():
    return ConvParameters((torch.randn(24, 64, 1, 1).half() / 8,), (torch.randn(24).half(),))


def test_every_plan_is_a_candidate_and_the_fastest_is_used(monkeypatch):
    variants = backends.get("triton").plans(PROBLEM)
    timed = fake_times(monkeypatch, {f"triton:{variants[3]}": 0.1})
    result = tune_problem(PROBLEM, folded())
    assert {f"triton:{variant}" for variant in variants} <= set(timed)
    assert result.chosen == f"triton:{variants[3]}"
    plans = []
    bind = conv2d.bind
    monkeypatch.setattr(conv2d, "bind", lambda *args: plans.append(args[1].name) or bind(*args))
    backend = backends.resolve(PROBLEM, "auto")
    assert backend.name == "triton"
    backend.prepare(PROBLEM, folded())
    assert plans == [variants[3]]


def test_a_wrong_plan_is_dropped_loudly(monkeypatch, caplog):
    wrong = backends.get("triton").plans(PROBLEM)[0]
    pack = conv2d.pack
    monkeypatch.setattr(conv2d, "pack", lambda weight, conv, plan: pack(weight, conv, plan) * (2 if plan.name == wrong else 1))
    monkeypatch.setattr(ConvParameters, "pack", lambda self, key, make: make())
    fake_times(monkeypatch, {f"triton:{wrong}": 0.1})
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        result = tune_problem(PROBLEM, folded())
    assert result.chosen != f"triton:{wrong}"
    assert list(result.dropped) == [f"triton:{wrong}"]
    assert f"drops triton:{wrong}" in caplog.text


def test_a_plan_of_another_version_gives_way_to_the_heuristic():
    entry = {"backend": "triton", "variant": "1x1x1-w1-s1-k1"}
    tuning_cache.record(PROBLEM.device, {tuning_cache.key(PROBLEM): entry})
    x, residual = torch.randn(PROBLEM.shape).half(), torch.randn(PROBLEM.output_shape()).half()
    kernel = backends.resolve(PROBLEM, "auto").prepare(PROBLEM, folded())
    assert kernel(x, residual).isfinite().all()
    assert configs.plans(PROBLEM, configs.Chip.of(PROBLEM.device), False)
