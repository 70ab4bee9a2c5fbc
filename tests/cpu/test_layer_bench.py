"""The benchmark layer by layer: its count of operations, and that it times what a model consists of."""

from __future__ import annotations

import torch
from support.problems import problem_of

from resnet_fused.backends import Conv
from resnet_fused.bench.layers import LayerResult, operations, run_layers
from resnet_fused.bench.peaks import measure_peak
from resnet_fused.bench.workloads import Workload


def test_operations_of_a_projected_block():
    convs = (Conv(8, 4, (1, 1)), Conv(4, 4, (3, 3), (2, 2), (1, 1)), Conv(4, 16, (1, 1)), Conv(8, 16, (1, 1), (2, 2)))
    problem = problem_of("bottleneck", (2, 8, 6, 6), torch.float32, torch.device("cpu"), convs, shortcut=True)
    multiply_adds = 2 * (36 * 8 * 4 + 9 * 4 * 4 * 9 + 9 * 4 * 16 + 9 * 8 * 16)
    assert operations(problem) == 2 * multiply_adds
    assert LayerResult(problem, 1, "cpu", {"auto": 2.0, "cpu": 3.0}).gflops == 2 * multiply_adds / 2.0 * 1e-6


def test_every_layer_of_a_model_is_timed_on_every_backend():
    results = list(run_layers(Workload("resnet18", 1, "float32", (32, 32)), seconds=0.0))
    assert sum(result.count for result in results) == 10  # the stem, eight blocks and the classifier
    for result in results:
        assert {"auto", "cpu", "onednn", "reference"} >= set(result.milliseconds) >= {"auto", "reference"}
    peak = measure_peak(torch.float32)
    assert peak is not None
    assert peak > 1
