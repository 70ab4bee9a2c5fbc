"""FlopCounterMode counts for our operators what it counts for stock's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.processes import run_python
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf

Run = Callable[[Tensor], Any]
FORMATS = [torch.contiguous_format, torch.channels_last]
ONE, TWO, POINT = [1, 1, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1]
ops = torch.ops.resnet_fused


def t(*shape: int) -> Tensor:
    return torch.randn(shape)


def flops(run: Run, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops()


def convs(*layers: tuple[int, int, int, int, int]) -> Run:
    """Convolutions one after the other; input channels, output channels, kernel, stride, padding."""

    def run(x: Tensor) -> Tensor:
        for inputs, outputs, kernel, stride, padding in layers:
            x = F.conv2d(x, t(outputs, inputs, kernel, kernel), None, stride, padding)
        return x

    return run


def both(*runs: Run) -> Run:
    return lambda x: [run(x) for run in runs]


# By operator: ours and stock's, on x of shape (2, 8, 12, 13).
CASES: dict[str, tuple[Run, Run]] = {
    "conv2d_bn": (lambda x: ops.conv2d_bn(x, t(12, 8, 3, 3), t(12), [1, 1], [1, 1], [1, 1], 1), convs((8, 12, 3, 1, 1))),
    "conv2d_bn_relu-strided": (
        lambda x: ops.conv2d_bn_relu(x, t(12, 8, 3, 3), t(12), [2, 2], [0, 0], [1, 1], 1),
        convs((8, 12, 3, 2, 0)),
    ),
    "conv2d_bn_relu-groups": (
        lambda x: ops.conv2d_bn_relu(x, t(8, 2, 3, 3), t(8), [1, 1], [1, 1], [1, 1], 4),
        lambda x: F.conv2d(x, t(8, 2, 3, 3), None, 1, 1, 1, 4),
    ),
    "conv2d_bn_add_relu": (
        lambda x: ops.conv2d_bn_add_relu(x, t(8, 8, 1, 1), t(8), x, [1, 1], [0, 0], [1, 1], 1),
        convs((8, 8, 1, 1, 0)),
    ),
    "basic_block": (
        lambda x: ops.basic_block(x, [t(8, 8, 3, 3), t(8, 8, 3, 3)], [t(8), t(8)], [*ONE, *ONE]),
        convs((8, 8, 3, 1, 1), (8, 8, 3, 1, 1)),
    ),
    "basic_block-projected": (
        lambda x: ops.basic_block(
            x, [t(16, 8, 3, 3), t(16, 16, 3, 3), t(16, 8, 1, 1)], [t(16)] * 3, [*TWO, *ONE, 2, 2, 0, 0, 1, 1, 1]
        ),
        both(convs((8, 16, 3, 2, 1), (16, 16, 3, 1, 1)), convs((8, 16, 1, 2, 0))),
    ),
    "bottleneck": (
        lambda x: ops.bottleneck(x, [t(4, 8, 1, 1), t(4, 4, 3, 3), t(8, 4, 1, 1)], [t(4), t(4), t(8)], [*POINT, *ONE, *POINT]),
        convs((8, 4, 1, 1, 0), (4, 4, 3, 1, 1), (4, 8, 1, 1, 0)),
    ),
    "stem": (
        lambda x: ops.stem(x, t(16, 8, 7, 7), t(16), [2, 2, 3, 3, 1, 1, 1], [3, 3, 2, 2, 1, 1]),
        convs((8, 16, 7, 2, 3)),
    ),
    "bn_relu_conv2d": (
        lambda x: ops.bn_relu_conv2d(
            x, t(8), t(8), t(8), torch.rand(8), t(4, 8, 3, 3), None, 1e-5, "", [1, 1], [1, 1], [1, 1], 1
        ),
        convs((8, 4, 3, 1, 1)),
    ),
    "conv2d": (lambda x: ops.conv2d(x, t(12, 8, 3, 3), 1, 1), convs((8, 12, 3, 1, 1))),
    "add_relu": (lambda x: ops.add_relu(x, x), torch.relu),
    "bn": (lambda x: ops.bn(x, None, None, None, None, 1e-5, ""), lambda x: F.batch_norm(x, None, None, training=True)),
}


@pytest.mark.parametrize("format", FORMATS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("case", CASES)
def test_operators(case, format):
    ours, stock = CASES[case]
    x = t(2, 8, 12, 13).to(memory_format=format)
    count = flops(stock, x)
    assert (count == 0) == (case in ("add_relu", "bn"))
    assert flops(ours, x) == count


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"])
def test_gradients_of_a_convolution(needs):
    """As many as stock's: those of x and of the weight are as many each as the convolution's."""
    x, weight = t(2, 8, 12, 13), t(12, 8, 3, 3)
    dy = F.conv2d(x, weight, None, 1, 1)
    got = flops(lambda dy: ops.conv2d_backward(dy, x, weight, 1, 1, [*needs]), dy)
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*needs, False]
    assert got == flops(lambda dy: torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry), dy) > 0


@pytest.mark.filterwarnings("ignore:.*global hooks on modules:UserWarning")  # the counter's own
@pytest.mark.parametrize("format", FORMATS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_fused_models(mode, format, trained):
    model = trained(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])).to(memory_format=format)
    x = torch.randn(2, 3, 40, 48).to(memory_format=format)
    fused = rf.fuse(model)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,)).module()
        compiled = torch.compile(fused, backend="aot_eager")  # which runs eagerly while a mode counts
        compiled(x)
    with mode():
        count = flops(model, x)
        assert [flops(run, x) for run in (fused, exported, compiled)] == [count] * 3
    assert any("resnet_fused" in str(node.target) for node in exported.graph.nodes)


def test_training_of_our_blocks():
    counts = []
    for block in (torchvision.models.resnet.BasicBlock, rf.BasicBlock):
        model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5).to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
        counts.append(flops(lambda x, model=model: model(x).sum().backward(), x))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "resnet_fused"])
def test_formulas_are_there_whichever_is_imported_first(first):
    run_python(
        "import importlib, sys, torch\n"
        "importlib.import_module(sys.argv[1])\n"
        "import resnet_fused as rf\n"
        "from torch.utils.flop_counter import FlopCounterMode, flop_registry\n"
        "assert torch.ops.resnet_fused.program in flop_registry\n"
        "x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 1, 1)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    rf.functional.conv2d_bn_relu(x, w, torch.randn(6))\n"
        "assert counter.get_total_flops() == 2 * 25 * 4 * 6\n"
        "assert not any(type(finder).__module__.startswith('resnet_fused') for finder in sys.meta_path)\n",
        first,
    )
