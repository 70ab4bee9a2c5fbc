"""The plans of the backend "cpu" that rf.tune tries: each is right, and a recorded one is used."""

from __future__ import annotations

import pytest
import torch
from support.fake_tuning import fake_times, tune_problem
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock

from resnet_fused import backends
from resnet_fused.backends import Conv, Problem, get, tuning_cache
from resnet_fused.backends.cpu import plan as cpu_plan
from resnet_fused.backends.cpu.chain import Chain
from resnet_fused.backends.processor import Processor
from resnet_fused.verification import cases as trials

F32, BF16 = torch.float32, torch.bfloat16


def _3x3(channels: int, out: int, stride: int = 1) -> Conv:
    return Conv(channels, out, (3, 3), (stride, stride), (1, 1))


def _1x1(channels: int, out: int) -> Conv:
    return Conv(channels, out, (1, 1))


def posed(op: str, shape: tuple[int, int, int, int], *convs: Conv, dtype: torch.dtype = F32, **more) -> Problem:
    return problem_of(op, shape, dtype, torch.device("cpu"), convs, **more)


PROBLEMS = {
    "3x3": posed("conv2d_bn_add_relu", (2, 32, 19, 23), _3x3(32, 40)),
    "3x3-few-tiles": posed("conv2d_bn_relu", (1, 80, 5, 6), _3x3(80, 24)),
    "3x3-bfloat16": posed("conv2d_bn_relu", (1, 32, 14, 14), _3x3(32, 32), dtype=BF16),
    "3x3-stride": posed("conv2d_bn_relu", (2, 32, 21, 18), _3x3(32, 48, 2)),
    "basic-block": posed("basic_block", (2, 32, 18, 14), _3x3(32, 32), _3x3(32, 32)),
    "bottleneck": posed("bottleneck", (1, 64, 17, 21), _1x1(64, 32), _3x3(32, 32), _1x1(32, 64)),
    "bottleneck-projected": posed(
        "bottleneck", (2, 32, 3, 5), _1x1(32, 16), _3x3(16, 16), _1x1(16, 64), _1x1(32, 64), shortcut=True
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the tuning_cache."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    tuning_cache.forget()
    yield
    tuning_cache.forget()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_plan_is_as_exact_as_stock(isa, problem):
    backend = get("cpu")
    assert backend.why_not(problem) is None
    x, folded, residual = trials.tensors(problem)
    reference = get("reference")
    stock = reference.prepare(problem, folded)(x, residual)
    wide = [t.double() if t is not None else None for t in (x, residual)]
    truth = reference.prepare(
        problem.with_dtype(torch.float64),
        folded.to(torch.float64),
    )
    variants = backend.plans(problem)
    assert len(variants) > 1
    for variant in variants:
        assert_as_good_as_stock(backend.prepare(problem, folded, variant)(x, residual), stock, truth(*wide))


def test_plans_are_distinct_and_the_first_is_the_one_taken_without_measuring():
    for problem in PROBLEMS.values():
        found = [plans_of(problem)[name] for name in get("cpu").plans(problem)]
        assert len({tuple(plan) for plan in found}) == len(found)
        rule = cpu_plan.block if len(problem.convs) > 1 else cpu_plan.winograd
        assert found[0] == [*map(int, rule(problem) or ())]


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(posed("conv2d_bn", (1, 16, 8, 8), _1x1(16, 16)), id="1x1"),
        pytest.param(posed("conv2d_bn_relu", (1, 16, 8, 8), _3x3(16, 16), precision="direct"), id="exact"),
        pytest.param(posed("conv2d_bn_relu", (1, 3, 32, 32), Conv(3, 64, (7, 7), (2, 2), (3, 3))), id="stem"),
        pytest.param(posed("bn_relu", (1, 16, 8, 8)), id="norm"),
    ],
)
def test_there_is_no_choice_where_there_is_one_algorithm(problem):
    assert get("cpu").plans(problem) == []


@pytest.mark.parametrize("name", ["3x3", "bottleneck"])
def test_the_fastest_plan_is_recorded_and_used(name, monkeypatch):
    problem, backend = PROBLEMS[name], get("cpu")
    _, folded, _ = trials.tensors(problem)
    chosen = backend.plans(problem)[-1]
    timed = fake_times(monkeypatch, {f"cpu:{chosen}": 0.1})
    result = tune_problem(problem, folded)
    assert not result.dropped
    assert {f"cpu:{variant}" for variant in backend.plans(problem)} <= set(timed)
    assert ("parts" in timed) == (name == "bottleneck")

    assert backends.resolve(problem, "auto") is backend
    assert plans_used(monkeypatch, problem, folded) == [plans_of(problem)[chosen]]


def plans_of(problem: Problem) -> dict[str, list[int]]:
    """Numbers of a problem's plans, by their names."""
    if len(problem.convs) > 1:
        return cpu_plan.block_plans(problem)
    return {**cpu_plan.winograd_plans(problem), "direct": []}


def plans_used(monkeypatch, problem: Problem, parameters) -> list[list[int]]:
    """Numbers of the plans that the backend's kernel for a problem runs by."""
    used: list[list[int]] = []
    for step in ("conv", "block"):
        original = getattr(Chain, step)
        monkeypatch.setattr(Chain, step, lambda *args, original=original: used.append(args[-1]) or original(*args))
    x, _, residual = trials.tensors(problem)
    get("cpu").prepare(problem, parameters)(x, residual)
    return used


def test_a_recorded_plan_that_is_not_known_gives_way_to_the_rules(monkeypatch):
    problem = PROBLEMS["3x3"]
    _, folded, _ = trials.tensors(problem)
    entry = {"backend": "cpu", "plan": "winograd4-tiles0-chunk7-by-panels"}
    tuning_cache.record(problem.device, {tuning_cache.key(problem): entry})
    assert plans_used(monkeypatch, problem, folded) == [[*map(int, cpu_plan.winograd(problem))]]


@pytest.mark.parametrize("model, generation", [(0x02, "Zen 5"), (0x55, "unknown")])
def test_it_is_said_where_the_rules_were_not_fitted(isa, model, generation, monkeypatch):
    monkeypatch.setattr(cpu_plan, "processor", lambda: Processor("AMD EPYC", "AuthenticAMD", 0x1A, model))
    fitted = generation == "Zen 5" and isa == "avx512"
    assert cpu_plan.fitted() == fitted
    assert ("first choices fitted on Zen 5 with AVX-512" in get("cpu").details()) != fitted


@pytest.mark.parametrize("size", [20, 60])
def test_dilated_filters_are_left_to_onednn(size):
    for dilation, ours in ((1, True), (2, False)):
        conv = Conv(64, 64, (3, 3), (1, 1), (dilation, dilation), (dilation, dilation))
        assert cpu_plan.conv_preferred(posed("conv2d_bn_relu", (1, 64, size, size), conv)) == ours
