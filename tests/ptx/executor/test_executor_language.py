"""What C++ compiles to, and CUB's block algorithms, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ptx_executor as px
import pytest
import torch

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_structures_calls_symbols_and_printf(cuda: Callable[..., px.Module], memory: px.Memory, arch: str) -> None:
    module = cuda("language.cu", arch)
    lookup, x = np.arange(8, dtype=np.float32) * 10, np.arange(64, dtype=np.float32) * 0.75
    module.write_symbol("lookup", lookup)
    layout = {"names": ["scale", "shift", "x", "table"], "formats": ["i4", "f4", "u8", "5i2"], "offsets": [0, 4, 8, 16]}
    options = np.zeros((), np.dtype({**layout, "itemsize": 32}))
    options["scale"], options["shift"], options["x"], options["table"] = 3, 0.5, memory.upload(x), [1, 2, -3, 4, 5]
    y = memory.empty(256)
    counters = module.launch("structures", 1, 64, [options.tobytes(), y, 2], memory=memory)
    whole = x.astype(int)
    inner = x * 2 + lookup[whole & 7]
    np.testing.assert_array_equal(memory.download(y, np.float32, 64), inner * 3 + 0.5 - 3 + whole)
    assert counters.printed == [f"thread 3 of block: {inner[3]:.2f}\n"]
    assert memory.download(module.symbol_address("counter", memory), np.uint32, 1)[0] == 64


def test_divergent_loops_and_switch(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    n = 150
    x = RNG.integers(1, 1000, n).astype(np.int32)
    steps, odd = memory.empty(4 * n), memory.empty(4 * n)
    cuda("language.cu").launch("collatz", 3, 64, [memory.upload(x), steps, odd, n], memory=memory)
    want = []
    for value in x.tolist():
        count = 0
        while value != 1:
            value, count = 3 * value + 1 if value & 1 else value >> 1, count + 1
        want.append([count + 1000, count * 3, count ^ 0x55, count - 7][count & 3])
    assert memory.download(steps, np.int32, n).tolist() == want
    votes = memory.download(odd, np.uint32, n)
    for k in range(n):
        warp = want[k // 32 * 32 : k // 32 * 32 + 32]
        assert votes[k] == sum((v & 1) << lane for lane, v in enumerate(warp))


def test_local_arrays(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.integers(0, 1000, (40, 8)).astype(np.int32)
    y = memory.empty(x.nbytes)
    cuda("language.cu").launch("sort_local", 1, 40, [memory.upload(x), y], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.int32, x.shape), np.sort(x, axis=1))


def test_atomics_and_a_lock(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.integers(0, 100, 64).astype(np.int32)
    bins, total, most, packed, pair = (memory.zeros(32) for _ in range(5))
    cuda("language.cu").launch("atomic_mix", 2, 32, [memory.upload(x), bins, total, most, packed, pair], memory=memory)
    assert memory.download(bins, np.int32, 8).tolist() == np.bincount(x & 7, minlength=8).tolist()
    assert memory.download(total, np.float32, 1)[0] == 0.5 * x.sum()
    assert memory.download(most, np.int32, 3).tolist() == [x.max(), 0, 64]
    assert memory.download(packed, np.uint64, 1)[0] == 64 << 40
    assert memory.download(pair, np.float16, 2).tolist() == [64, 128]


def test_named_barriers_between_producers_and_consumers(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.integers(0, 100, (3, 64)).astype(np.int32)
    y = memory.empty(x.nbytes)
    counters = cuda("language.cu").launch("producer_consumer", 1, 128, [memory.upload(x), y, 3], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.int32, x.shape), x[:, ::-1] * 2 + 1)
    assert counters.barriers == 5


@pytest.mark.parametrize("threads", [64, 100])
def test_barrier_reductions(cuda: Callable[..., px.Module], memory: px.Memory, threads: int) -> None:
    x = RNG.integers(0, 9, threads).astype(np.int32)
    y = memory.empty(12 * threads)
    cuda("language.cu").launch("block_votes", 1, threads, [memory.upload(x), y], memory=memory)
    want = [(x > 3).sum(), int((x < 10).all()), int((x == 7).any())]
    assert (memory.download(y, np.int32, (threads, 3)) == want).all()


def test_release_and_acquire_order_shared_memory(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.standard_normal(32).astype(np.float32)
    y = memory.empty(128)
    cuda("language.cu").launch("flag", 1, 64, [memory.upload(x), y], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.float32, 32), x[::-1])


def test_syncwarp_is_met_at_different_places(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y, lane = np.arange(32, dtype=np.int32) * 7, memory.empty(128), np.arange(32)
    cuda("language.cu").launch("syncwarp_in_branches", 1, 32, [memory.upload(x), y], memory=memory)
    want = np.where(lane & 1, x[lane ^ 1] + 100, x[lane ^ 1] * 2 + 1)
    np.testing.assert_array_equal(memory.download(y, np.int32, 32), want)


def test_grid_and_block_of_three_dimensions(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    y = memory.empty(4 * 24 * 30)
    cuda("language.cu").launch("indices", (2, 3, 4), (5, 3, 2), [y], memory=memory)
    want = np.arange(24)[:, None] * 1000 + np.arange(30)
    np.testing.assert_array_equal(memory.download(y, np.int32, (24, 30)), want)


def test_float_library_functions(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    """nvcc's own code for them, within its documented errors of a few units in the last place."""
    a, b = RNG.standard_normal((2, 64)).astype(np.float32) * 4
    y = memory.empty(64 * 40)
    cuda("language.cu").launch("float_functions", 1, 64, [memory.upload(a), memory.upload(b), y], memory=memory)
    got, x, z = memory.download(y, np.float32, (64, 10)), a.astype(np.float64), b.astype(np.float64)
    want = [
        x * z + 1,
        x / z,
        np.sqrt(abs(x)),
        np.exp(x),
        np.log(abs(x)),
        np.sin(np.float64(a * np.float32(100))),
        np.tanh(x),
    ]
    want += [x + z, np.rint(x), abs(x) ** z]
    for k, exact in enumerate(want):
        np.testing.assert_allclose(got[:, k], exact, rtol=4 * 2.0**-23, atol=2.0**-23 if k == 5 else 0)
    np.testing.assert_array_equal(got[:, 1], a / b)  # correctly rounded


def test_half_vectors(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y = RNG.standard_normal((2, 256)).astype(np.float16)
    place = memory.upload(y)
    cuda("language.cu").launch("half_vectors", 1, 32, [memory.upload(x), place, np.float16(1.5)], memory=memory)
    want = np.maximum((1.5 * x.astype(np.float64) + y).astype(np.float16), 0)
    np.testing.assert_array_equal(memory.download(place, np.float16, 256), want)


def test_bfloat16_vectors_from_torch_tensors(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y = torch.randn(2, 256).bfloat16()
    place = memory.upload(y)
    cuda("language.cu").launch("bfloat_vectors", 1, 32, [memory.upload(x), place, 1.5], memory=memory)
    want = (1.5 * x.double() + y.double()).bfloat16()
    assert torch.equal(memory.download(place, torch.bfloat16, 256), want)


def test_cub_block_reductions(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y = RNG.standard_normal((3, 128)).astype(np.float32), memory.empty(12)
    cuda("library.cu").launch("block_sum", 3, 128, [memory.upload(x), y], memory=memory)
    np.testing.assert_allclose(memory.download(y, np.float32, 3), x.sum(1, dtype=np.float64), rtol=2e-6, atol=2e-6)
    v, most = RNG.integers(-(10**9), 10**9, (3, 192)).astype(np.int32), memory.empty(12)
    cuda("library.cu").launch("block_max_raking", 3, 96, [memory.upload(v), most], memory=memory)
    assert memory.download(most, np.int32, 3).tolist() == v.max(1).tolist()


def test_cub_block_scan(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.integers(0, 1000, (2, 512)).astype(np.int32)
    y = memory.empty(x.nbytes)
    cuda("library.cu").launch("block_scan", 2, 128, [memory.upload(x), y], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.int32, x.shape), x.cumsum(1) - x)


def test_cub_block_sort(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x = RNG.integers(-(10**9), 10**9, 256).astype(np.int32)
    y = memory.empty(x.nbytes)
    cuda("library.cu").launch("block_sort", 1, 64, [memory.upload(x), y], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.int32, 256), np.sort(x))
