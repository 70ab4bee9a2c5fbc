"""Steps in a row run by one call: residual blocks of any wiring, memory that results share, arguments, lifetime."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from support.problems import problem_of
from support.tolerances import assert_as_good_as_stock
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends import NO_PARAMETERS, Activation, ConvParameters, Epilogue, get
from resnet_fused.backends.binding import join
from resnet_fused.backends.cpu.chain import Chain, ChainKernel
from resnet_fused.backends.cpu.packing import padded_bias
from resnet_fused.backends.problem import Conv

SHAPE = (2, 32, 9, 10)
BY_TILES = [4, 8, 4, 64, 0]

RELU = Epilogue(activation=Activation.RELU)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)


class Recorded:
    """A chain of 3×3 and 1×1 convolutions of 32 channels, and the same in stock PyTorch."""

    def __init__(self) -> None:
        self.chain = Chain([SHAPE, SHAPE], torch.float32)
        self.results: list[int] = []
        self.steps: list[tuple[int, int | None, torch.Tensor, torch.Tensor]] = []

    def conv(self, x: int, residual: int | None = None, kernel: int = 3) -> int:
        weight = torch.randn(32, 32, kernel, kernel) * (32 * kernel**2) ** -0.5
        bias = torch.randn(32)
        packed = torch.ops.resnet_fused_cpu.pack(weight.contiguous(memory_format=torch.channels_last), kernel == 3)
        geometry = [kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1]
        plan = BY_TILES if kernel == 3 else []
        result = self.chain.conv(x, residual, packed, padded_bias(bias), 32, 1, geometry, RELU, NO_PARAMETERS, plan)
        self.steps.append((x, residual, weight, bias))
        return result

    def ours(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not self.results:
            self.results = [len(self.steps) + 1]
            self.chain.end(self.results)
        (y,) = torch.ops.resnet_fused_cpu.run_chain(self.chain.id, [x, x if residual is None else residual])
        return y

    def stock(self, x: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        values = [x.to(dtype), None if residual is None else residual.to(dtype)]
        for source, added, weight, bias in self.steps:
            y = F.conv2d(values[source], weight.to(dtype), bias.to(dtype), padding=weight.shape[2] // 2)
            values.append((y if added is None else y + values[added]).relu())
        return values[-1]


# Each a list of (x, residual, kernel): which value a step reads, which it adds, and its kernel.
WIRINGS = {
    "one step": [(0, None, 3)],
    "one step, the residual from outside": [(0, 1, 3)],
    "the residual from outside, twice": [(0, 1, 3), (2, 1, 1)],
    "x as residual": [(0, None, 3), (2, 0, 3)],
    "blocks in a row, written over each other": [
        *[(0, None, 1), (2, None, 3), (3, 0, 1)],
        *[(4, None, 3), (5, 4, 1)],
        *[(6, None, 3), (7, 6, 1)],
    ],
    "a residual that is read once more later": [(0, None, 3), (2, None, 3), (3, 2, 1), (4, 2, 3)],
    "a step's x as its residual": [(0, None, 3), (2, 2, 3)],
    "a projection": [(0, None, 1), (0, None, 3), (3, 2, 1)],
    "a result that nothing reads": [(0, None, 3), (0, None, 1)],
}


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=[*WIRINGS])
def test_steps_in_a_row(isa: str, x: torch.Tensor, wiring: list[tuple[int, int | None, int]]):
    recorded = Recorded()
    for step in wiring:
        recorded.conv(*step)
    residual = torch.randn_like(x) if any(step[1] == 1 for step in wiring) else None
    before = x.clone(), None if residual is None else residual.clone()
    y = recorded.ours(x, residual)
    assert_as_good_as_stock(y, recorded.stock(x, residual, torch.float32), recorded.stock(x, residual, torch.float64))
    # What came from outside is left as it was, and a second call, in memory that the first has used, gives the same.
    assert torch.equal(x, before[0])
    assert residual is None or torch.equal(residual, before[1])
    assert torch.equal(recorded.ours(x, residual), y)


def test_results_in_between_take_no_more_memory_than_needed(x: torch.Tensor):
    """Ten blocks in a row: their results lie in one place, and each has two more results at a time inside of it."""
    library = torch.ops.resnet_fused_cpu
    recorded = Recorded()
    value = recorded.conv(0)
    for _ in range(10):
        inner = recorded.conv(recorded.conv(value, None, 1))
        value = recorded.conv(inner, value, 1)
    gc.collect()  # what other tests left must not come back meanwhile
    library.release_activations()
    recorded.ours(x)
    # Of 23 kB each, in blocks of 64 kB. The last result is a tensor's own, from PyTorch's memory.
    assert library.release_activations() <= 3 * 64 * 1024


def _kernel(op: str = "conv2d_bn_relu", memory_format: torch.memory_format = torch.channels_last):
    conv = Conv(32, 32, (3, 3), (1, 1), (1, 1))
    problem = problem_of(op, SHAPE, torch.float32, torch.device("cpu"), (conv,), memory_format=memory_format)
    folded = ConvParameters((torch.randn(32, 32, 3, 3) * 0.05,), (torch.randn(32),))
    return get("cpu").prepare(problem, folded)


def test_kernels_in_a_row_are_one(x: torch.Tensor):
    first, second = _kernel(), _kernel("conv2d_bn")
    both = join([first, second], [(0,), (2,)])
    assert isinstance(both, ChainKernel)
    assert torch.equal(both(x, None), second(first(x, None), None))
    # Any memory format is taken.
    assert torch.equal(both(x.contiguous(), None), both(x, None))


def test_kernels_of_other_kinds_are_left_alone():
    in_turn = ((0,), (2,))
    assert not isinstance(join([_kernel(), lambda x, residual: x], in_turn), ChainKernel)
    assert not isinstance(join([_kernel(memory_format=torch.contiguous_format), _kernel()], in_turn), ChainKernel)


class Watch(TorchDispatchMode):
    """Notes the operators that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_a_chain_lives_as_long_as_its_kernel(x: torch.Tensor):
    kernel = _kernel()
    kernel(x, None)
    id = kernel.run.chain.id
    torch.ops.resnet_fused_cpu.run_chain(id, [x])
    with Watch() as watch:
        del kernel
        gc.collect()
    assert not watch.seen
    with pytest.raises(ValueError, match=f"chain is {id}"):
        torch.ops.resnet_fused_cpu.run_chain(id, [x])


def test_wrong_inputs_are_refused(x: torch.Tensor):
    recorded, run = Recorded(), torch.ops.resnet_fused_cpu.run_chain
    with pytest.raises(ValueError, match="no results"):
        run(recorded.chain.id, [x, x])
    with pytest.raises(ValueError, match="x is 2"):
        recorded.conv(2)
    with pytest.raises(ValueError, match="residual is 5"):
        recorded.conv(0, 5)
    y = recorded.conv(0, 1)
    for results in ([], [0], [y, y], [y + 1]):
        with pytest.raises(ValueError, match="result"):
            recorded.chain.end(results)
    recorded.ours(x, x)
    with pytest.raises(ValueError, match="has its results already"):
        recorded.conv(0)
    with pytest.raises(ValueError, match="inputs has 1"):
        run(recorded.chain.id, [x])
    with pytest.raises(ValueError, match="input 0 differs in shape or dtype"):
        recorded.ours(x[:1], x)
    with pytest.raises(ValueError, match="input 1 differs in shape or dtype"):
        recorded.ours(x, x[:1])
    with pytest.raises(ValueError, match="not channels_last"):
        recorded.ours(x.contiguous(), x)
    with pytest.raises(ValueError, match="a size that isn't positive, of input 1"):
        Chain([SHAPE, (0, 32, 9, 10)], torch.float32)
    with pytest.raises(ValueError, match="must have four"):
        Chain([SHAPE[1:]], torch.float32)


def test_a_chain_of_other_kernels_is_refused(x: torch.Tensor):
    library = torch.ops.resnet_fused_cpu
    recorded = Recorded()
    recorded.conv(0)
    highest = library.isa()
    try:
        library.limit_isa(highest - 1)
        with pytest.raises(ValueError, match="limit_isa"):
            recorded.ours(x)
    finally:
        library.limit_isa(highest)
