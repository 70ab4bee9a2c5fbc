"""basic_block, bottleneck, stem and add_relu on every backend of this machine, against float64 and stock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.refusals import MAY_BE_REFUSED_WHEN_TRIED, Asked, Machine, refusal
from support.tolerances import assert_as_good_as_stock
from torch import Tensor

import resnet_fused as rf
from resnet_fused.backends import BackendError

F = torch.nn.functional
BACKENDS = ["auto", *rf.available_backends()]


@dataclass(frozen=True)
class Block:
    """A block's problem: channels in, inside and out, its stride, and what is special about it."""

    id: str
    op: str
    channels: tuple[int, int, int]
    shape: tuple[int, int, int] = (2, 14, 14)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.channels_last
    nan: bool = False

    def tensors(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        n, h, w = self.shape
        inside, middle, out = self.channels
        x = torch.randn(n, inside, h, w).to(self.dtype).contiguous(memory_format=self.layout)
        if self.nan:
            x[0, 1, 2, 3] = float("nan")
        if self.op == "basic_block":
            filters = [(middle, inside, 3), (out, middle, 3)]
        else:
            filters = [(middle, inside, 1), (middle, middle // self.groups, 3), (out, middle, 1)]
        if self.stride != 1 or inside != out:
            filters.append((out, inside, 1))
        weights = [(torch.randn(k, c, r, r) / (c * r * r) ** 0.5).to(self.dtype) for k, c, r in filters]
        return x, weights, [torch.randn(k).to(self.dtype) for k, _, _ in filters]

    def run(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        if self.op == "basic_block":
            return rf.functional.basic_block(x, weights, biases, self.stride)
        return rf.functional.bottleneck(x, weights, biases, self.stride, self.dilation, self.groups)

    def stock(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        if self.op == "basic_block":
            y = F.conv2d(x, weights[0], biases[0], self.stride, 1).relu()
            y = F.conv2d(y, weights[1], biases[1], 1, 1)
        else:
            y = F.conv2d(x, weights[0], biases[0]).relu()
            y = F.conv2d(y, weights[1], biases[1], self.stride, self.dilation, self.dilation, self.groups).relu()
            y = F.conv2d(y, weights[2], biases[2])
        main = 2 if self.op == "basic_block" else 3
        return (y + (F.conv2d(x, weights[main], biases[main], self.stride) if len(weights) > main else x)).relu()


BF16 = torch.bfloat16
BLOCKS = [
    Block("basic", "basic_block", (64, 64, 64), (1, 28, 28)),
    Block("basic-projection", "basic_block", (64, 128, 128), (2, 15, 13), stride=2),
    Block("basic-odd-channels", "basic_block", (7, 7, 7), (2, 5, 9)),
    Block("basic-contiguous", "basic_block", (16, 16, 16), layout=torch.contiguous_format),
    Block("basic-bfloat16", "basic_block", (64, 64, 64), dtype=BF16),
    Block("basic-float16", "basic_block", (64, 64, 64), dtype=torch.float16),
    Block("basic-nan", "basic_block", (64, 64, 64), nan=True),
    Block("basic-batch-0", "basic_block", (16, 16, 16), (0, 7, 7)),
    Block("bottleneck", "bottleneck", (256, 64, 256), (1, 28, 28)),
    Block("bottleneck-projection", "bottleneck", (64, 64, 256), (2, 14, 14)),
    Block("bottleneck-stride-2", "bottleneck", (128, 64, 256), (2, 15, 14), stride=2),
    Block("bottleneck-one-pixel", "bottleneck", (64, 16, 64), (3, 1, 1)),
    Block("bottleneck-groups", "bottleneck", (64, 64, 64), groups=32),
    Block("bottleneck-dilation", "bottleneck", (64, 32, 64), dilation=2),
    Block("bottleneck-contiguous", "bottleneck", (64, 16, 64), layout=torch.contiguous_format),
    Block("bottleneck-bfloat16", "bottleneck", (256, 64, 256), dtype=BF16),
    Block("bottleneck-float16", "bottleneck", (64, 64, 256), dtype=torch.float16),
    Block("bottleneck-nan", "bottleneck", (256, 64, 256), nan=True),
    Block("bottleneck-float64", "bottleneck", (16, 8, 16), dtype=torch.float64),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
@torch.no_grad()
def test_blocks_are_as_good_as_stock(block: Block):
    x, weights, biases = block.tensors()
    want = block.stock(x, weights, biases)
    truth = block.stock(x.double(), [w.double() for w in weights], [s.double() for s in biases])
    before = x.clone()
    asked = Asked(block.id, block.op, block.dtype, 0 in x.shape, block.groups)
    for backend in BACKENDS:
        refused = refusal(backend, asked, Machine.here(x.device.type))
        try:
            with rf.use_backend(backend):
                y = block.run(x, weights, biases)
        except BackendError as reason:
            assert refused is not None or backend in MAY_BE_REFUSED_WHEN_TRIED, f"{backend} refuses what it served: {reason}"
            assert refused is None or refused in str(reason)
            continue
        assert refused is None, f"{backend} serves what it refused"
        assert_as_good_as_stock(y, want, truth)
        assert y.is_contiguous() == want.is_contiguous()
    assert torch.equal(x, before) or block.nan


def _stem(x: Tensor, weight: Tensor, bias: Tensor, pool: tuple[int, int, int]) -> Tensor:
    return F.max_pool2d(F.conv2d(x, weight, bias, 2, 3).relu(), *pool)


STEMS = {
    "imagenet": ((2, 3, 64, 64), (3, 2, 1), torch.float32),
    "ragged": ((1, 3, 61, 47), (3, 2, 1), torch.float32),
    "pool-without-padding": ((2, 3, 64, 64), (3, 2, 0), torch.float32),
    "one-channel": ((2, 1, 32, 32), (3, 2, 1), torch.float32),
    "four-channels": ((2, 4, 32, 32), (3, 2, 1), torch.float32),
    "bfloat16": ((2, 3, 64, 64), (3, 2, 1), BF16),
    "tiny-image": ((2, 3, 8, 8), (3, 2, 1), torch.float32),
}


@pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("shape, pool, dtype", STEMS.values(), ids=STEMS)
@torch.no_grad()
def test_stem_is_as_good_as_stock(shape, pool, dtype, nan):
    x = torch.randn(shape)
    if nan:
        x[0, 0, shape[2] // 2, shape[3] // 2] = float("nan")
    x, weight, bias = x.to(dtype), (torch.randn(64, shape[1], 7, 7) / 12).to(dtype), torch.randn(64).to(dtype)
    want, truth = _stem(x, weight, bias, pool), _stem(x.double(), weight.double(), bias.double(), pool)
    for backend in BACKENDS:
        try:
            with rf.use_backend(backend):
                y = rf.functional.stem(x, weight, bias, 2, 3, *pool)
        except BackendError as reason:
            assert "can't serve" in str(reason)
            continue
        assert_as_good_as_stock(y, want, truth)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@torch.no_grad()
def test_add_relu(dtype):
    x = torch.randn(2, 5, 7, 3).to(dtype)
    residual = torch.randn(2, 5, 7, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    want = (x + residual).relu()
    y = rf.functional.add_relu(x, residual)
    assert torch.equal(y, want) or torch.equal(y.isnan(), want.isnan())
    assert_as_good_as_stock(y, want, (x.double() + residual.double()).relu())


DERIVATIVES = {
    "basic": Block("", "basic_block", (3, 3, 3), (1, 4, 4), dtype=torch.float64),
    "basic-projection": Block("", "basic_block", (2, 3, 3), (1, 4, 4), stride=2, dtype=torch.float64),
    "bottleneck": Block("", "bottleneck", (4, 2, 4), (1, 3, 3), dtype=torch.float64),
    "bottleneck-projection": Block("", "bottleneck", (3, 2, 4), (1, 4, 4), stride=2, groups=2, dtype=torch.float64),
}


@pytest.mark.parametrize("block", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_of_blocks(block: Block):
    x, weights, biases = block.tensors()
    arguments = [t.requires_grad_() for t in (x, *weights, *biases)]
    count = len(weights)

    def function(x, *parameters):
        return block.run(x, list(parameters[:count]), list(parameters[count:]))

    # Stock's own derivatives may differ in rounding from call to call on a GPU.
    nondet_tol = 0.0 if x.device.type == "cpu" else 1e-12
    assert torch.autograd.gradcheck(function, arguments, nondet_tol=nondet_tol)
    assert torch.autograd.gradgradcheck(function, arguments, nondet_tol=nondet_tol)


def test_derivative_of_the_stem():
    x, weight, bias = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3), torch.randn(3)
    arguments = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: rf.functional.stem(*a, 2, 1), arguments)


def test_block_with_a_weight_missing_says_so():
    x, weights, biases = Block("", "bottleneck", (16, 4, 16)).tensors()
    with pytest.raises(ValueError, match="weights has 2 and biases 2 tensors; bottleneck takes 3 of each, or 4"):
        rf.functional.bottleneck(x, weights[:2], biases[:2])


def test_a_pool_with_too_much_padding_says_how_much_is_allowed():
    x, weight, bias = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 7, 7), torch.randn(8)
    with pytest.raises(ValueError, match="pool_padding is 2; it must be at most half of pool_kernel, which is 3. Pass less"):
        rf.functional.stem(x, weight, bias, pool_padding=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths_of_different_sizes_are_refused(dtype):
    """Without padding the main path loses four rows and columns, and the 1×1 shortcut none."""
    weights = [torch.randn(16, 16, 3, 3), torch.randn(16, 16, 3, 3), torch.randn(16, 16, 1, 1)]
    weights, biases = [w.to(dtype) for w in weights], [torch.randn(16).to(dtype)] * 3
    with pytest.raises(
        ValueError, match=r"shortcut's result has shape \(1, 16, 9, 8\) and that of the main path \(1, 16, 5, 4\)"
    ):
        rf.functional.basic_block(torch.randn(1, 16, 9, 8).to(dtype), weights, biases, padding=0)
