"""Every op as torch.library sees it: schema, fake implementation, autograd registration, AOT dispatch."""

from __future__ import annotations

import pytest
import torch

import resnet_fused as rf

ONE = [1, 1, 1, 1, 1, 1, 1]
POINT = [1, 1, 0, 0, 1, 1, 1]


def _t(*shape: int, grad: bool = True, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    tensor = torch.randn(shape)
    if len(shape) == 4:
        tensor = tensor.contiguous(memory_format=layout)
    return tensor.requires_grad_(grad)


CL = torch.channels_last
CALLS = {
    "conv2d_bn": lambda: (_t(2, 8, 6, 6), _t(12, 8, 3, 3), _t(12), [1, 1], [1, 1], [1, 1], 1),
    "conv2d_bn-channels-last": lambda: (_t(2, 8, 6, 6, layout=CL), _t(12, 8, 3, 3), _t(12), [2, 2], [1, 1], [1, 1], 1),
    "conv2d_bn_relu": lambda: (_t(2, 8, 6, 6), _t(12, 8, 3, 3), _t(12), [2, 2], [1, 1], [1, 1], 1),
    "conv2d_bn_relu-channels-last": lambda: (_t(2, 8, 6, 6, layout=CL), _t(12, 8, 3, 3), _t(12), [1, 1], [1, 1], [1, 1], 1),
    "conv2d_bn_relu-no-grad": lambda: (
        _t(2, 8, 6, 6, grad=False),
        _t(8, 4, 1, 1, grad=False),
        _t(8, grad=False),
        [1, 1],
        [0, 0],
        [1, 1],
        2,
    ),
    "conv2d_bn_add_relu": lambda: (_t(2, 8, 6, 6), _t(8, 8, 3, 3), _t(8), _t(2, 8, 6, 6), [1, 1], [1, 1], [1, 1], 1),
    "add_relu": lambda: (_t(2, 3, 4, 5), _t(2, 3, 4, 5)),
    "basic_block": lambda: (_t(2, 4, 6, 6), [_t(4, 4, 3, 3), _t(4, 4, 3, 3)], [_t(4), _t(4)], [*ONE, *ONE]),
    "basic_block-channels-last": lambda: (
        _t(2, 4, 6, 6, layout=CL),
        [_t(8, 4, 3, 3), _t(8, 8, 3, 3), _t(8, 4, 1, 1)],
        [_t(8), _t(8), _t(8)],
        [*ONE, *ONE, *POINT],
    ),
    "bottleneck": lambda: (
        _t(2, 8, 6, 6),
        [_t(4, 8, 1, 1), _t(4, 4, 3, 3), _t(8, 4, 1, 1)],
        [_t(4), _t(4), _t(8)],
        [*POINT, *ONE, *POINT],
    ),
    "stem": lambda: (_t(2, 3, 16, 16), _t(8, 3, 7, 7), _t(8), [2, 2, 3, 3, 1, 1, 1], [3, 3, 2, 2, 1, 1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str):
    operator = getattr(torch.ops.resnet_fused, name.split("-")[0]).default
    torch.library.opcheck(operator, CALLS[name]())


def test_ops_stand_in_a_compiled_graph_without_a_break():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def function(x, w, s):
        return rf.functional.conv2d_bn_relu(x, w, s, padding=1)

    with torch.no_grad():
        x, w, s = _t(1, 4, 5, 5), _t(4, 4, 3, 3), _t(4)
        y = function(x, w, s)
        assert torch.equal(y, rf.functional.conv2d_bn_relu(x, w, s, padding=1))
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [
        torch.ops.resnet_fused.conv2d_bn_relu.default
    ]


def test_vmap_gives_what_stock_gives():
    x, w, s = torch.randn(3, 2, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.randn(4)
    got = torch.vmap(lambda x: rf.functional.conv2d_bn_relu(x, w, s, padding=1))(x)
    want = torch.vmap(lambda x: torch.conv2d(x, w, s, padding=1).relu())(x)
    torch.testing.assert_close(got, want)
