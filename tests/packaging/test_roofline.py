"""resnet-fused roofline: its counts by hand, its bounds, and what it prints."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.problems import problem_of

from resnet_fused import cli
from resnet_fused.backends import Conv, Pool
from resnet_fused.bench import roofline
from resnet_fused.bench.peaks import measure_bandwidth
from resnet_fused.bench.roofline import LAYERS, STOCK, WHOLE, Machine, Work, work

CPU = torch.device("cpu")


def _moved(ops):
    return [op.moved for op in ops]


def test_counts_of_one_convolution_with_a_residual():
    """y has 2·6·3·3 = 108 elements, x 2·4·6·6 = 288, the weight 6·4·3·3 = 216."""
    conv = Conv(4, 6, (3, 3), (2, 2), (1, 1))
    problem = problem_of("conv2d_bn_add_relu", (2, 4, 6, 6), torch.float32, CPU, (conv,))
    ops = work(problem)
    multiply_adds = 108 * 4 * 9
    assert ops[STOCK] == [
        Work(2 * multiply_adds, 4 * (288 + 216 + 108)),
        Work(0, 4 * (2 * 108 + 4 * 6)),  # batch norm
        Work(0, 4 * 3 * 108),  # sum
        Work(0, 4 * 2 * 108),  # ReLU
    ]
    assert ops[LAYERS] == ops[WHOLE] == [Work(2 * multiply_adds, 4 * (288 + 216 + 6 + 108 + 108))]
    half = work(problem_of("conv2d_bn", (2, 4, 6, 6), torch.float16, CPU, (conv,)))
    assert _moved(half[STOCK]) == [2 * (288 + 216 + 108), 2 * (2 * 108 + 4 * 6)]
    assert _moved(half[WHOLE]) == [2 * (288 + 216 + 6 + 108)]


def test_a_bottleneck_moves_512_instead_of_1024_channels_a_pixel():
    """What whole-block fusion saves of an identity bottleneck of 64 and 256 channels, the weights aside."""
    convs = (Conv(256, 64, (1, 1)), Conv(64, 64, (3, 3), (1, 1), (1, 1)), Conv(64, 256, (1, 1)))
    parameters = 256 * 64 + 64 * 64 * 9 + 64 * 256 + 64 + 64 + 256
    ops = work(problem_of("bottleneck", (1, 256, 10, 10), torch.float32, CPU, convs))
    assert sum(_moved(ops[LAYERS])) == 4 * (1024 * 100 + parameters)
    assert _moved(ops[WHOLE]) == [4 * (512 * 100 + parameters)]
    assert {sum(op.operations for op in level) for level in ops.values()} == {2 * 100 * (parameters - 64 - 64 - 256)}


def test_a_projection_reads_the_input_again_and_has_no_relu():
    convs = (Conv(8, 16, (3, 3), (2, 2), (1, 1)), Conv(16, 16, (3, 3), (1, 1), (1, 1)), Conv(8, 16, (1, 1), (2, 2)))
    ops = work(problem_of("basic_block", (1, 8, 8, 8), torch.float32, CPU, convs, shortcut=True))
    assert len(ops[STOCK]) == 3 * 2 + 2 + 1  # convolutions with batch norms, two ReLUs, one sum
    x, y = 8 * 64, 16 * 16
    assert ops[LAYERS][0] == Work(2 * y * 8, 4 * (x + 8 * 16 + 16 + y))


def test_a_stem_ends_with_the_pool():
    pool = Pool((3, 3), (2, 2), (1, 1))
    problem = problem_of("stem", (1, 3, 32, 32), torch.float32, CPU, (Conv(3, 64, (7, 7), (2, 2), (3, 3)),), pool=pool)
    ops = work(problem)
    assert ops[STOCK][-1] == ops[LAYERS][-1] == Work(0, 4 * 64 * (16 * 16 + 8 * 8))
    assert _moved(ops[WHOLE]) == [4 * (3 * 32 * 32 + 64 * 3 * 49 + 64 + 64 * 8 * 8)]


def test_bounds_are_the_larger_of_both_and_add_up():
    machine = Machine(peak=100.0, bandwidth=10.0)  # GFLOP/s, GB/s
    arithmetic, memory = Work(10**9, 10**7), Work(10**6, 10**8)
    assert machine.bound([arithmetic]) == pytest.approx(10.0)
    assert machine.bound([memory]) == pytest.approx(10.0)
    assert machine.bound([arithmetic, memory]) == pytest.approx(20.0)
    assert machine.limit(arithmetic) == "arithmetic"
    assert machine.limit(memory) == "memory"


def test_prints_bounds_and_says_so(tmp_path, capsys, monkeypatch):
    found = roofline.problems
    monkeypatch.setattr(roofline, "problems", lambda model, size: Counter() if model == "vgg11" else found(model, size))
    path = tmp_path / "new" / "roofline.png"
    arguments = ["--models", "resnet18,vgg11", "--size", "64", "--batches", "1,64", "--dtypes", "float16", "--peak", "312000"]
    assert cli.main(["roofline", *arguments, "--bandwidth", "2000", "--plot", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Bounds, not measurements" in text
    assert "resnet18, batch 64, float16, 64×64; peak 312000 GFLOP/s, memory bandwidth 2000 GB/s" in text
    assert "64×64×16×16" in text
    assert "vgg11, batch 1, float16, 64×64: rf.fuse found nothing in it to fuse" in text
    assert path.read_bytes().startswith(b"\x89PNG")


def test_shows_how_layers_divide_among_threads(capsys):
    arguments = ["--models", "resnet18", "--size", "64", "--batches", "1", "--dtypes", "float32", "--scaling", "2,16"]
    assert cli.main(["roofline", *arguments]) == 0
    text = capsys.readouterr().out
    assert "resnet18, batch 1, float32, 64×64: how the CPU kernels divide each layer among threads" in text
    assert "basic_block(64 3×3, 64 3×3)" in text
    assert "all of them" in text
    assert torch.get_num_threads() != 16


def test_bandwidth_is_measured():
    assert 1 < measure_bandwidth() < 2000
